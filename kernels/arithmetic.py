"""Arithmetic with the rounding of torch's eager operators on the same device."""

import triton
import triton.language as tl
from triton.language.target_info import is_hip

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
AS_ON_CPU: tl.constexpr = INTERPRETED
"""Torch's CPU operators multiply by `value` first. Its GPU operators multiply or divide first and
fuse the product with `value` into the sum: so says torch 2.11's machine code for sm_90."""

TINY_ROOTS_FAIL: tl.constexpr = tl.constexpr(
    not INTERPRETED.value and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
)
"""Triton 3.6 takes roots on AMD GPUs by a sequence that makes NaN of subnormal numbers."""


@triton.jit
def neg(x):
    """-x. Triton's minus is 0 - x, which loses the sign of a zero."""
    return x * -1.0


@triton.jit
def sqrt_rn(x):
    if x.dtype == tl.float64:  # tl.sqrt_rn takes fp32 only; fp64 is always rounded to nearest
        return tl.sqrt(x)
    elif TINY_ROOTS_FAIL and is_hip():  # scaled by powers of two, which round nothing
        tiny = x < 2.0**-96
        root = tl.sqrt_rn(tl.where(tiny, x * 2.0**64, x))
        return tl.where(tiny, root * 2.0**-32, root)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def div_rn(x, y):
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def fma(x, y, z):
    """x * y + z, rounded once."""
    if not INTERPRETED:
        return tl.fma(x, y, z)
    elif x.dtype == tl.float32:  # triton < 3.9 interprets it with two roundings; fp64 has none
        return (x.to(tl.float64) * y + z).to(tl.float32)
    else:  # Dekker's product and Knuth's sum, each with its error
        big_x, big_y = x * 134217729.0, y * 134217729.0
        high_x, high_y = big_x - (big_x - x), big_y - (big_y - y)
        low_x, low_y = x - high_x, y - high_y
        product = x * y
        error = low_x * low_y - (((product - high_x * high_y) - low_x * high_y) - high_x * low_y)
        total = product + z
        part = total - product
        exact = total + (((product - (total - part)) + (z - part)) + error)
        return tl.where(exact == exact, exact, total)  # infinities have no error


@triton.jit
def lerp(start, end, weight):
    near_start = fma(weight, end - start, start)
    return tl.where(tl.abs(weight) < 0.5, near_start, fma(weight - 1, end - start, end))


@triton.jit
def addcmul(x, y, z, value):
    """x + value * y * z"""
    if AS_ON_CPU:
        return fma(value * y, z, x)
    else:
        return fma(value, y * z, x)


@triton.jit
def addcdiv(x, y, z, value):
    """x + value * y / z"""
    if AS_ON_CPU:
        return x + div_rn(value * y, z)
    else:
        return fma(value, div_rn(y, z), x)
