"""Rprop on the device. Read beside `rprop_` in `tritonopt/eager.py`."""

import triton
import triton.language as tl

from tritonopt.kernels.arithmetic import neg
from tritonopt.kernels.update import update


@triton.jit
def rprop_rule(
    param, grad, prev, step_size,
    etaminus, etaplus, step_size_min, step_size_max, loss_rose,
    MAXIMIZE: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = param.dtype
    if MAXIMIZE:
        grad = neg(grad)
    agreement = grad * prev  # NaN is neither positive nor negative: it counts as 0
    if VARIANT == "rprop+" or VARIANT == "irprop+":  # the last update, taken back
        sign = (prev > 0).to(dtype) - (prev < 0).to(dtype)
        back = agreement if VARIANT == "rprop+" else agreement * tl.cast(loss_rose, dtype)
        param = tl.where(back < 0, param + sign * step_size, param)
    if VARIANT == "rprop-":
        prev = grad
    else:
        prev = tl.where(agreement < 0, 0.0, grad)  # on a change of sign: stay put, forget the sign
    factor = tl.where(agreement < 0, tl.cast(etaminus, dtype), tl.cast(1.0, dtype))
    factor = tl.where(agreement > 0, tl.cast(etaplus, dtype), factor)
    step_size = tl.maximum(step_size * factor, tl.cast(step_size_min, dtype), tl.PropagateNan.ALL)
    step_size = tl.minimum(step_size, tl.cast(step_size_max, dtype), tl.PropagateNan.ALL)
    sign = (prev > 0).to(dtype) - (prev < 0).to(dtype)
    param = param - sign * step_size
    return param, prev, step_size


@triton.jit
def compact_rprop_rule(
    param, grad, code,
    etaminus, etaplus, step_size_min, step_size_max, loss_rose,
    MAXIMIZE: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    # `tritonopt/compact.py` says what lies where.
    bits = code.to(tl.int32, bitcast=True)
    prev = ((bits & 1) - (bits & 2)).to(tl.float32)
    step_size = (bits & -4).to(tl.float32, bitcast=True)
    param, prev, step_size = rprop_rule(
        param, grad, prev, step_size,
        etaminus, etaplus, step_size_min, step_size_max, loss_rose, MAXIMIZE, VARIANT,
    )  # fmt: skip
    sign = (prev > 0).to(tl.int32) - (prev < 0).to(tl.int32)
    bits = step_size.to(tl.int32, bitcast=True)
    bits = tl.where(step_size == step_size, (bits + 2) & -4, 0x7FC00000)  # of NaN, all may be 1
    return param, (bits | (sign & 3)).to(tl.float32, bitcast=True)


@triton.jit
def rprop_kernel(
    table_ptr, programs_ptr, factor_ptr, skip_ptr, noise_ptr,
    etaminus: "fp64", etaplus: "fp64", step_size_min: "fp64", step_size_max: "fp64",
    loss_rose: "fp64",
    COMPACT: tl.constexpr, MAXIMIZE: tl.constexpr, VARIANT: tl.constexpr,
    TYPES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    update(
        table_ptr, programs_ptr, factor_ptr, skip_ptr, noise_ptr,
        compact_rprop_rule if COMPACT else rprop_rule,
        (etaminus, etaplus, step_size_min, step_size_max, loss_rose, MAXIMIZE, VARIANT),
        TYPES, BLOCK,
    )  # fmt: skip
