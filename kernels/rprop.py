"""Rprop on the device. Read beside `rprop_` in `tritonopt/eager.py`."""

import triton
import triton.language as tl

from tritonopt.kernels.arithmetic import neg


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
def rprop_block(
    param_ptr, grad_ptr, prev_ptr, step_size_ptr, offs, mask, factor_ptr,
    etaminus, etaplus, step_size_min, step_size_max, loss_rose,
    MAXIMIZE: tl.constexpr, VARIANT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    param = tl.load(param_ptr + offs, mask).to(COMPUTE)
    grad = tl.load(grad_ptr + offs, mask).to(COMPUTE)
    if factor_ptr is not None:
        grad = grad * tl.load(factor_ptr).to(COMPUTE)
    prev = tl.load(prev_ptr + offs, mask).to(COMPUTE)
    step_size = tl.load(step_size_ptr + offs, mask).to(COMPUTE)

    param, prev, step_size = rprop_rule(
        param, grad, prev, step_size,
        etaminus, etaplus, step_size_min, step_size_max, loss_rose, MAXIMIZE, VARIANT,
    )  # fmt: skip

    # Where dtypes differ, a thread may store other elements of a tensor than it has loaded.
    if param_ptr.dtype != grad_ptr.dtype or param_ptr.dtype != prev_ptr.dtype:
        tl.debug_barrier()
    tl.store(param_ptr + offs, param, mask)
    tl.store(prev_ptr + offs, prev, mask)
    tl.store(step_size_ptr + offs, step_size, mask)


@triton.jit
def rprop_kernel(
    table_ptr, programs_ptr, factor_ptr, skip_ptr,
    etaminus: "fp64", etaplus: "fp64", step_size_min: "fp64", step_size_max: "fp64",
    loss_rose: "fp64",
    MAXIMIZE: tl.constexpr, VARIANT: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # A row of the table: numel, then addresses; 0 where there is no gradient.
    program = tl.load(programs_ptr + tl.program_id(0))
    row_ptr = table_ptr + (program >> 32) * 5
    start = (program & 0xFFFFFFFF) * BLOCK
    offs = tl.arange(0, BLOCK)
    numel, param, grad = tl.load(row_ptr), tl.load(row_ptr + 1), tl.load(row_ptr + 2)
    prev, step_size = tl.load(row_ptr + 3), tl.load(row_ptr + 4)

    # A mask whose bound may not divide by 16 makes every access scalar, hence two paths; hints to
    # the compiler hold only where they are written in the kernel itself.
    aligned = (param | grad | prev | step_size) % 16 == 0
    present = grad != 0
    if skip_ptr is not None:
        present = present & (tl.load(skip_ptr) == 0)
    left = numel - start
    if present & aligned & (left >= BLOCK):
        rprop_block(
            tl.multiple_of(param.to(tl.pointer_type(PARAM)), 16) + start,
            tl.multiple_of(grad.to(tl.pointer_type(GRAD)), 16) + start,
            tl.multiple_of(prev.to(tl.pointer_type(STATE)), 16) + start,
            tl.multiple_of(step_size.to(tl.pointer_type(STATE)), 16) + start,
            offs, None, factor_ptr,
            etaminus, etaplus, step_size_min, step_size_max, loss_rose, MAXIMIZE, VARIANT, COMPUTE,
        )  # fmt: skip
    elif present:
        rprop_block(
            param.to(tl.pointer_type(PARAM)) + start,
            grad.to(tl.pointer_type(GRAD)) + start,
            prev.to(tl.pointer_type(STATE)) + start,
            step_size.to(tl.pointer_type(STATE)) + start,
            offs, offs < tl.minimum(left, BLOCK).to(tl.int32), factor_ptr,
            etaminus, etaplus, step_size_min, step_size_max, loss_rose, MAXIMIZE, VARIANT, COMPUTE,
        )  # fmt: skip
