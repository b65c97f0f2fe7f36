"""A third rule, as a researcher would write it: Lion (Chen et al., 2023, arXiv:2302.06675)."""

import torch
import triton
import triton.language as tl

from tritonopt.kernels.arithmetic import fma, lerp
from tritonopt.optimizer import FusedOptimizer, Rule


def lion_(param, grad, exp_avg, scratch, *, lr, beta1, beta2, weight_decay):
    param.mul_(1 - lr * weight_decay)
    param.sub_(torch.sign(exp_avg.lerp(grad, 1 - beta1)) * lr)
    exp_avg.lerp_(grad, 1 - beta2)


@triton.jit
def lion_block(
    param_ptr, grad_ptr, exp_avg_ptr, offs, mask, factor_ptr, lr, beta1, beta2, weight_decay,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    param = tl.load(param_ptr + offs, mask).to(COMPUTE)
    grad = tl.load(grad_ptr + offs, mask).to(COMPUTE)
    if factor_ptr is not None:
        grad = grad * tl.load(factor_ptr).to(COMPUTE)
    exp_avg = tl.load(exp_avg_ptr + offs, mask).to(COMPUTE)

    param = param * tl.cast(1 - lr * weight_decay, COMPUTE)
    update = lerp(exp_avg, grad, tl.cast(1 - beta1, COMPUTE))
    sign = (update > 0).to(COMPUTE) - (update < 0).to(COMPUTE)
    param = fma(tl.cast(lr, COMPUTE), -sign, param)
    exp_avg = lerp(exp_avg, grad, tl.cast(1 - beta2, COMPUTE))

    tl.debug_barrier()  # where dtypes differ, a thread stores what another has loaded
    tl.store(param_ptr + offs, param, mask)
    tl.store(exp_avg_ptr + offs, exp_avg, mask)


@triton.jit
def lion_kernel(
    table_ptr, programs_ptr, factor_ptr, skip_ptr,
    lr: "fp64", beta1: "fp64", beta2: "fp64", weight_decay: "fp64",
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.load(programs_ptr + tl.program_id(0))
    row_ptr = table_ptr + (program >> 32) * 4  # numel, param, grad, exp_avg
    start = (program & 0xFFFFFFFF) * BLOCK
    param, grad, exp_avg = tl.load(row_ptr + 1), tl.load(row_ptr + 2), tl.load(row_ptr + 3)
    present = grad != 0
    if skip_ptr is not None:
        present = present & (tl.load(skip_ptr) == 0)
    if present:
        offs = tl.arange(0, BLOCK)
        lion_block(
            param.to(tl.pointer_type(PARAM)) + start,
            grad.to(tl.pointer_type(GRAD)) + start,
            exp_avg.to(tl.pointer_type(STATE)) + start,
            offs, offs < tl.load(row_ptr) - start, factor_ptr, lr, beta1, beta2, weight_decay,
            COMPUTE,
        )  # fmt: skip


def launch_lion_(launch, table, grad_dtype, *, lr, beta1, beta2, weight_decay):
    pointers = table, launch.programs, launch.factor, launch.skip
    launch.run(lion_kernel, pointers, (lr, beta1, beta2, weight_decay), (), grad_dtype)


class Lion(FusedOptimizer):
    _names = ("lr", "betas", "weight_decay")

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, **options):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults, **options)

    def rule(self, group):
        return Rule("Lion", lion_, lambda: launch_lion_, ("exp_avg",), ("exp_avg",))

    def hyper(self, group):
        beta1, beta2 = group["betas"]
        hyper = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        return {**hyper, "beta1": beta1, "beta2": beta2}
