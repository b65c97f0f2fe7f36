"""RMSprop on the device. Read beside `rmsprop_` in `tritonopt/eager.py`."""

import triton
import triton.language as tl

from tritonopt.kernels.arithmetic import addcdiv, addcmul, div_rn, fma, lerp, neg, sqrt_rn


@triton.jit
def rmsprop_rule(
    param, grad, square_avg, grad_avg, momentum_buffer,
    lr, alpha, eps, weight_decay, momentum, gain,
    MAXIMIZE: tl.constexpr, DECAY: tl.constexpr, CENTERED: tl.constexpr, MOMENTUM: tl.constexpr,
    EPS_IN_SQRT: tl.constexpr, LR_IN_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    DECOUPLED: tl.constexpr, BIAS_CORRECTION: tl.constexpr,
):  # fmt: skip
    # Products are fused where torch's eager operators fuse them: the same bits follow.
    dtype: tl.constexpr = param.dtype
    weight = tl.cast(1 - alpha, dtype)
    if MAXIMIZE:
        grad = neg(grad)
    if DECAY and not DECOUPLED:
        grad = fma(tl.cast(weight_decay, dtype), param, grad)
    rate = lr
    if BIAS_CORRECTION:  # gain is sqrt(1 - alpha**step); the eager rule says where it went
        rate = tl.cast(lr * gain, dtype)
        eps = eps * (gain * gain) if EPS_IN_SQRT else eps * gain
    square_avg = addcmul(square_avg * tl.cast(alpha, dtype), grad, grad, weight)
    avg = square_avg
    if CENTERED:
        grad_avg = lerp(grad_avg, grad, weight)
        inverse = tl.cast(-1.0, dtype)
        if BIAS_CORRECTION:  # not divided as fp64, which takes a call and its stack
            inverse = div_rn(inverse, tl.cast(gain * gain, dtype))
        avg = addcmul(avg, grad_avg, grad_avg, inverse)
        if BIAS_CORRECTION:
            avg = tl.maximum(avg, 0.0, tl.PropagateNan.ALL)
    if EPS_IN_SQRT:
        avg = sqrt_rn(avg + tl.cast(eps, dtype))
    else:
        avg = sqrt_rn(avg) + tl.cast(eps, dtype)
    if DECAY and DECOUPLED:
        param = param * tl.cast(1 - lr * weight_decay, dtype)
    if MOMENTUM:
        scale = tl.cast(-1.0, tl.float64) if LR_IN_MOMENTUM else neg(lr)
        value = tl.cast(rate if LR_IN_MOMENTUM else gain, dtype)
        momentum_buffer = addcdiv(momentum_buffer * tl.cast(momentum, dtype), grad, avg, value)
        if NESTEROV:
            param = addcdiv(param, neg(grad), avg, tl.cast(rate, dtype))
            scale = scale * momentum
        param = fma(tl.cast(scale, dtype), momentum_buffer, param)
    else:
        param = addcdiv(param, neg(grad), avg, tl.cast(rate, dtype))
    return param, square_avg, grad_avg, momentum_buffer


@triton.jit
def rmsprop_block(
    param_ptr, grad_ptr, square_avg_ptr, grad_avg_ptr, momentum_buffer_ptr, offs, mask,
    factor_ptr, lr, alpha, eps, weight_decay, momentum, gain,
    MAXIMIZE: tl.constexpr, DECAY: tl.constexpr, CENTERED: tl.constexpr, MOMENTUM: tl.constexpr,
    EPS_IN_SQRT: tl.constexpr, LR_IN_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    DECOUPLED: tl.constexpr, BIAS_CORRECTION: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    param = tl.load(param_ptr + offs, mask).to(COMPUTE)
    grad = tl.load(grad_ptr + offs, mask).to(COMPUTE)
    if factor_ptr is not None:
        grad = grad * tl.load(factor_ptr).to(COMPUTE)
    square_avg = tl.load(square_avg_ptr + offs, mask).to(COMPUTE)
    grad_avg, momentum_buffer = square_avg, square_avg  # not None, which triton 3.6 cannot return
    if CENTERED:
        grad_avg = tl.load(grad_avg_ptr + offs, mask).to(COMPUTE)
    if MOMENTUM:
        momentum_buffer = tl.load(momentum_buffer_ptr + offs, mask).to(COMPUTE)

    param, square_avg, grad_avg, momentum_buffer = rmsprop_rule(
        param, grad, square_avg, grad_avg, momentum_buffer,
        lr, alpha, eps, weight_decay, momentum, gain, MAXIMIZE, DECAY, CENTERED, MOMENTUM,
        EPS_IN_SQRT, LR_IN_MOMENTUM, NESTEROV, DECOUPLED, BIAS_CORRECTION,
    )  # fmt: skip

    # Where dtypes differ, a thread may store other elements of a tensor than it has loaded.
    if param_ptr.dtype != grad_ptr.dtype or param_ptr.dtype != square_avg_ptr.dtype:
        tl.debug_barrier()
    tl.store(param_ptr + offs, param, mask)
    tl.store(square_avg_ptr + offs, square_avg, mask)
    if CENTERED:
        tl.store(grad_avg_ptr + offs, grad_avg, mask)
    if MOMENTUM:
        tl.store(momentum_buffer_ptr + offs, momentum_buffer, mask)


@triton.jit
def rmsprop_kernel(
    table_ptr, programs_ptr, factor_ptr, skip_ptr, lr_ptr, gain_ptr,
    lr: "fp64", alpha: "fp64", eps: "fp64", weight_decay: "fp64", momentum: "fp64", gain: "fp64",
    MAXIMIZE: tl.constexpr, DECAY: tl.constexpr, CENTERED: tl.constexpr, MOMENTUM: tl.constexpr,
    EPS_IN_SQRT: tl.constexpr, LR_IN_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    DECOUPLED: tl.constexpr, BIAS_CORRECTION: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # A row of the table: numel, then addresses; 0 where there is no gradient, or no such state.
    program = tl.load(programs_ptr + tl.program_id(0))
    row_ptr = table_ptr + (program >> 32) * 6
    start = (program & 0xFFFFFFFF) * BLOCK
    offs = tl.arange(0, BLOCK)
    numel = tl.load(row_ptr)
    param, grad, square_avg = tl.load(row_ptr + 1), tl.load(row_ptr + 2), tl.load(row_ptr + 3)
    grad_avg, momentum_buffer = tl.load(row_ptr + 4), tl.load(row_ptr + 5)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float64)
    if gain_ptr is not None:  # one per tensor, which may have taken different numbers of steps
        gain = tl.load(gain_ptr + (program >> 32)).to(tl.float64)

    # A mask whose bound may not divide by 16 makes every access scalar, hence two paths; hints to
    # the compiler hold only where they are written in the kernel itself.
    aligned = (param | grad | square_avg | grad_avg | momentum_buffer) % 16 == 0
    present = grad != 0
    if skip_ptr is not None:
        present = present & (tl.load(skip_ptr) == 0)
    left = numel - start
    if present & aligned & (left >= BLOCK):
        rmsprop_block(
            tl.multiple_of(param.to(tl.pointer_type(PARAM)), 16) + start,
            tl.multiple_of(grad.to(tl.pointer_type(GRAD)), 16) + start,
            tl.multiple_of(square_avg.to(tl.pointer_type(STATE)), 16) + start,
            tl.multiple_of(grad_avg.to(tl.pointer_type(STATE)), 16) + start,
            tl.multiple_of(momentum_buffer.to(tl.pointer_type(STATE)), 16) + start,
            offs, None,
            factor_ptr, lr, alpha, eps, weight_decay, momentum, gain,
            MAXIMIZE, DECAY, CENTERED, MOMENTUM,
            EPS_IN_SQRT, LR_IN_MOMENTUM, NESTEROV, DECOUPLED, BIAS_CORRECTION, COMPUTE,
        )  # fmt: skip
    elif present:
        rmsprop_block(
            param.to(tl.pointer_type(PARAM)) + start,
            grad.to(tl.pointer_type(GRAD)) + start,
            square_avg.to(tl.pointer_type(STATE)) + start,
            grad_avg.to(tl.pointer_type(STATE)) + start,
            momentum_buffer.to(tl.pointer_type(STATE)) + start,
            offs, offs < tl.minimum(left, BLOCK).to(tl.int32),
            factor_ptr, lr, alpha, eps, weight_decay, momentum, gain,
            MAXIMIZE, DECAY, CENTERED, MOMENTUM,
            EPS_IN_SQRT, LR_IN_MOMENTUM, NESTEROV, DECOUPLED, BIAS_CORRECTION, COMPUTE,
        )  # fmt: skip
