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
def rprop_kernel(
    table_ptr, programs_ptr, factor_ptr, skip_ptr,
    etaminus: "fp64", etaplus: "fp64", step_size_min: "fp64", step_size_max: "fp64",
    loss_rose: "fp64",
    MAXIMIZE: tl.constexpr, VARIANT: tl.constexpr,
    TYPES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    update(
        table_ptr, programs_ptr, factor_ptr, skip_ptr, rprop_rule,
        (etaminus, etaplus, step_size_min, step_size_max, loss_rose, MAXIMIZE, VARIANT),
        TYPES, BLOCK,
    )  # fmt: skip
