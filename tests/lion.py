"""A third rule, as a researcher would write it: Lion (Chen et al., 2023, arXiv:2302.06675)."""

import torch
import triton
import triton.language as tl

from tritonopt.kernels.arithmetic import fma, lerp
from tritonopt.kernels.update import update
from tritonopt.optimizer import FusedOptimizer, Rule


def lion_(param, grad, exp_avg, scratch, *, lr, beta1, beta2, weight_decay):
    param.mul_(1 - lr * weight_decay)
    param.sub_(torch.sign(exp_avg.lerp(grad, 1 - beta1)) * lr)
    exp_avg.lerp_(grad, 1 - beta2)


@triton.jit
def lion_rule(param, grad, exp_avg, lr, beta1, beta2, weight_decay):
    dtype: tl.constexpr = param.dtype
    param = param * tl.cast(1 - lr * weight_decay, dtype)
    blend = lerp(exp_avg, grad, tl.cast(1 - beta1, dtype))
    sign = (blend > 0).to(dtype) - (blend < 0).to(dtype)
    param = fma(tl.cast(lr, dtype), -sign, param)
    exp_avg = lerp(exp_avg, grad, tl.cast(1 - beta2, dtype))
    return param, exp_avg


@triton.jit
def lion_kernel(
    table_ptr, programs_ptr, factor_ptr, skip_ptr, noise_ptr,
    lr: "fp64", beta1: "fp64", beta2: "fp64", weight_decay: "fp64",
    TYPES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    update(
        table_ptr, programs_ptr, factor_ptr, skip_ptr, noise_ptr,
        lion_rule, (lr, beta1, beta2, weight_decay), TYPES, BLOCK,
    )  # fmt: skip


def launch_lion_(launch, *, lr, beta1, beta2, weight_decay):
    launch.run(lion_kernel, (lr, beta1, beta2, weight_decay))


class Lion(FusedOptimizer):
    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, **options):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults, **options)

    def rule(self, group):
        return Rule("Lion", lion_, lambda: launch_lion_, ("exp_avg",), ("exp_avg",))

    def hyper(self, group):
        beta1, beta2 = group["betas"]
        hyper = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        return {**hyper, "beta1": beta1, "beta2": beta2}
