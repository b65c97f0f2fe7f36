"""Averages of squares in 8 bits. Read beside `tritonopt/quantized.py`, which says what they are."""

import triton
import triton.language as tl

from tritonopt import quantized
from tritonopt.kernels.arithmetic import div_rn

BLOCK: tl.constexpr = tl.constexpr(quantized.BLOCK)
MANTISSAS: tl.constexpr = tl.constexpr(tuple(quantized.MANTISSAS))
PER_WIDTH: tl.constexpr = tl.constexpr(quantized.PER_WIDTH)
BOUNDS: tl.constexpr = tl.constexpr(tuple(quantized.BOUNDS))


@triton.jit
def of_blocks(mask, NUMEL: tl.constexpr):
    """Whether a block has any element."""
    return tl.max(tl.reshape(mask.to(tl.int32), (NUMEL // BLOCK, BLOCK)), 1) > 0


@triton.jit
def per_element(scale, NUMEL: tl.constexpr):
    """The scale of each element's block."""
    whole = tl.broadcast_to(tl.expand_dims(scale, 1), (NUMEL // BLOCK, BLOCK))
    return tl.reshape(whole, (NUMEL,))


@triton.jit
def decoded(code, scale, NUMEL: tl.constexpr):
    number = code.to(tl.int32) + 1
    power = tl.full((NUMEL,), 1.0, tl.float32)
    for k in tl.static_range(1, 8):
        power = tl.where((number & 7) == k, MANTISSAS[k], power)
    bits = power.to(tl.int32, bitcast=True) + (((number >> 3) - 32) << 23)
    power = tl.where(code == 0, 0.0, bits.to(tl.float32, bitcast=True))
    return power * per_element(scale, NUMEL)


@triton.jit
def encoded(square_avg, mask, noise, NUMEL: tl.constexpr):
    if mask is not None:
        square_avg = tl.where(mask, square_avg, 0.0)
    whole = tl.reshape(square_avg, (NUMEL // BLOCK, BLOCK))
    scale = tl.reduce(whole, 1, greater)
    whole = tl.where(scale == 0, 1.0, scale)  # of 0 there is no code but 0
    ratio = div_rn(square_avg, per_element(whole, NUMEL))
    bits = ratio.to(tl.int32, bitcast=True)
    mantissa = bits & 0x7FFFFF
    code, begin = 255 + 8 * ((bits >> 23) - 127), 0
    for k in tl.static_range(7):
        code += (mantissa >= BOUNDS[k]).to(tl.int32)
        begin = tl.where(mantissa >= BOUNDS[k], BOUNDS[k], begin)
    lower = (bits & -0x800000 | begin).to(tl.float32, bitcast=True)
    code += ((ratio - lower) * PER_WIDTH > (noise.to(tl.float32) + 0.5) * lower).to(tl.int32)
    code = tl.minimum(tl.maximum(code, 1), 255)
    return tl.where(square_avg > 0, code, 0).to(tl.uint8), scale


@triton.jit
def greater(x, y):
    return tl.maximum(x, y, tl.PropagateNan.ALL)
