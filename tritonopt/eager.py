"""The update rules in plain torch. They define correctness: the kernels are tested against them.

Each rule has the name, the argument order and the line order of its kernel in `kernels/`. All
tensors are flat and of one dtype; `scratch` is two tensors of the same size. The operations and
their order are those of torch's for-loop optimizers, so that fp32 and fp64 agree to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rmsprop_(
    param: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    grad_avg: Tensor | None,
    momentum_buffer: Tensor | None,
    scratch: tuple[Tensor, Tensor],
    *,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    maximize: bool,
) -> None:
    if maximize:
        grad = torch.neg(grad, out=scratch[0])
    if weight_decay != 0:
        grad = torch.add(grad, param, alpha=weight_decay, out=scratch[0])
    square_avg.mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
    if grad_avg is not None:
        grad_avg.lerp_(grad, 1 - alpha)
        avg = torch.addcmul(square_avg, grad_avg, grad_avg, value=-1, out=scratch[1]).sqrt_()
    else:
        avg = torch.sqrt(square_avg, out=scratch[1])
    avg.add_(eps)
    if momentum_buffer is not None:
        momentum_buffer.mul_(momentum).addcdiv_(grad, avg)
        param.add_(momentum_buffer, alpha=-lr)
    else:
        param.addcdiv_(grad, avg, value=-lr)


def rprop_(
    param: Tensor,
    grad: Tensor,
    prev: Tensor,
    step_size: Tensor,
    scratch: tuple[Tensor, Tensor],
    *,
    etaminus: float,
    etaplus: float,
    step_size_min: float,
    step_size_max: float,
    maximize: bool,
) -> None:
    # No comparison, where or masked_fill: on a CPU each costs 5 to 50 times a multiply, while
    # threshold (x if x > bound else value) and its backward (grad if x > bound else 0) cost one.
    if maximize:
        grad = torch.neg(grad, out=scratch[0])
    agreement = torch.mul(grad, prev, out=scratch[1]).sign_()
    torch.ops.aten.threshold_backward.grad_input(grad, agreement, -0.5, grad_input=prev)
    factor = agreement.mul_(etaplus)  # etaplus, 0 or -etaplus, for etaplus, 1 and etaminus
    torch.threshold_(factor, -0.5, etaminus)
    torch.threshold_(factor, 0.0, 1.0)
    step_size.mul_(factor).clamp_(step_size_min, step_size_max)
    param.addcmul_(torch.sign(prev, out=factor), step_size, value=-1)
