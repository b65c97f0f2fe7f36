"""RMSprop on the device. Read beside `rmsprop_` in `tritonopt/eager.py`."""

import triton
import triton.language as tl

from tritonopt.kernels.arithmetic import addcdiv, addcmul, div_rn, fma, lerp, neg, sqrt_rn
from tritonopt.kernels.update import update


@triton.jit
def rmsprop_rule(
    param, grad, square_avg, grad_avg, momentum_buffer,
    lr, alpha, eps, weight_decay, momentum, gain, mean,
    MAXIMIZE: tl.constexpr, DECAY: tl.constexpr, CENTERED: tl.constexpr, MOMENTUM: tl.constexpr,
    EPS_IN_SQRT: tl.constexpr, LR_IN_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    DECOUPLED: tl.constexpr, NAN_SAFE: tl.constexpr, BIAS_CORRECTION: tl.constexpr,
    CAUTIOUS: tl.constexpr, COUNTS: tl.constexpr,
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
        if BIAS_CORRECTION or NAN_SAFE:
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
        if CAUTIOUS:
            update = momentum_buffer
            if NESTEROV:
                update = addcdiv(update * tl.cast(momentum, dtype), grad, avg, value)
            mask = (update * grad > 0).to(dtype)
            if COUNTS:
                param = mask
            else:
                mean = tl.maximum(tl.cast(mean, dtype), tl.cast(1e-3, dtype))
                update = update * (mask * div_rn(tl.cast(1.0, dtype), mean))
                param = fma(tl.cast(scale, dtype), update, param)
        else:
            if NESTEROV:
                param = addcdiv(param, neg(grad), avg, tl.cast(rate, dtype))
                scale = scale * momentum
            param = fma(tl.cast(scale, dtype), momentum_buffer, param)
    else:
        param = addcdiv(param, neg(grad), avg, tl.cast(rate, dtype))
    return param, square_avg, grad_avg, momentum_buffer


@triton.jit
def rmsprop_kernel(
    table_ptr, programs_ptr, factor_ptr, skip_ptr, noise_ptr, lr_ptr, gain_ptr, mean_ptr,
    counts_ptr,
    lr: "fp64", alpha: "fp64", eps: "fp64", weight_decay: "fp64", momentum: "fp64", gain: "fp64",
    MAXIMIZE: tl.constexpr, DECAY: tl.constexpr, CENTERED: tl.constexpr, MOMENTUM: tl.constexpr,
    EPS_IN_SQRT: tl.constexpr, LR_IN_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    DECOUPLED: tl.constexpr, NAN_SAFE: tl.constexpr, BIAS_CORRECTION: tl.constexpr,
    CAUTIOUS: tl.constexpr, TYPES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float64)
    if gain_ptr is not None:  # one per tensor, which may have taken different numbers of steps
        program = tl.load(programs_ptr + tl.program_id(0))
        gain = tl.load(gain_ptr + (program >> 32)).to(tl.float64)
    mean = 1.0
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + (tl.load(programs_ptr + tl.program_id(0)) >> 32))
    update(
        table_ptr, programs_ptr, factor_ptr, skip_ptr, noise_ptr, rmsprop_rule,
        (lr, alpha, eps, weight_decay, momentum, gain, mean, MAXIMIZE, DECAY, CENTERED, MOMENTUM,
         EPS_IN_SQRT, LR_IN_MOMENTUM, NESTEROV, DECOUPLED, NAN_SAFE, BIAS_CORRECTION,
         CAUTIOUS, counts_ptr is not None),
        TYPES, BLOCK, counts_ptr,
    )  # fmt: skip
