"""The update rules in plain torch. They define correctness: the kernels are tested against them.

Each rule has the name, the argument order and the line order of its kernel in `kernels/`. All
tensors are flat and of one dtype; `scratch` is two tensors of the same size. The operations and
their order are those of torch's for-loop optimizers, so that fp32 and fp64 agree to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

hardtanh_backward = torch.ops.aten.hardtanh_backward
threshold_backward = torch.ops.aten.threshold_backward


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
    eps_in_sqrt: bool = False,
    lr_in_momentum: bool = False,
    nesterov: bool = False,
    decoupled_weight_decay: bool = False,
    step: float | None = None,
) -> None:
    """`step` is the number of steps with this one, for bias correction; None: no correction."""
    if isinstance(lr, Tensor):
        lr = lr.double()  # type: ignore[assignment]  # its products are rounded as a float's
    if maximize:
        grad = torch.neg(grad, out=scratch[0])
    if weight_decay != 0 and not decoupled_weight_decay:
        grad = torch.add(grad, param, alpha=weight_decay, out=scratch[0])
    # sqrt(v / c) is sqrt(v) / sqrt(c): taken out of the denominator, bias correction changes
    # scalars only and costs nothing per element.
    gain, rate, inverse = 1.0, lr, 1.0
    if step is not None:
        correction = 1 - alpha**step
        gain = correction**0.5
        rate, inverse = lr * gain, 1 / correction
        eps = eps * (correction if eps_in_sqrt else gain)
    square_avg.mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
    avg = square_avg
    if grad_avg is not None:
        grad_avg.lerp_(grad, 1 - alpha)
        avg = torch.addcmul(avg, grad_avg, grad_avg, value=-inverse, out=scratch[1])
        if step is not None:
            avg.clamp_min_(0)  # exactly 0 at the first step, where rounding may fall below
    if eps_in_sqrt:
        avg = torch.add(avg, eps, out=scratch[1]).sqrt_()
    else:
        avg = torch.sqrt(avg, out=scratch[1]).add_(eps)
    if weight_decay != 0 and decoupled_weight_decay:
        param.mul_(1 - lr * weight_decay)
    if momentum_buffer is not None:
        scale = -1.0 if lr_in_momentum else -lr
        value = rate if lr_in_momentum else gain
        momentum_buffer.mul_(momentum).addcdiv_(grad, avg, value=value)
        if nesterov:
            param.addcdiv_(grad, avg, value=-rate)
            scale = scale * momentum
        param.add_(momentum_buffer, alpha=scale)
    else:
        param.addcdiv_(grad, avg, value=-rate)


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
    variant: str = "irprop-",
    loss_rose: bool = False,
) -> None:
    # No comparison, where or masked_fill: on a CPU each costs 5 to 50 times a multiply, while
    # threshold (x if x > bound else value) and the backward of threshold and hardtanh (grad if
    # x > bound, or low < x < high, else 0) cost one.
    if maximize:
        grad = torch.neg(grad, out=scratch[0])
    agreement = torch.mul(grad, prev, out=scratch[1]).sign_()
    if variant == "rprop+" or (variant == "irprop+" and loss_rose):
        hardtanh_backward.grad_input(prev, agreement, -1.5, -0.5, grad_input=prev)
        param.addcmul_(prev.sign_(), step_size)  # on a change of sign: the last update, taken back
    if variant == "rprop-":
        prev.copy_(grad)
    else:
        threshold_backward.grad_input(grad, agreement, -0.5, grad_input=prev)
    factor = agreement.mul_(etaplus)  # etaplus, 0 or -etaplus, for etaplus, 1 and etaminus
    torch.threshold_(factor, -0.5, etaminus)
    torch.threshold_(factor, 0.0, 1.0)
    step_size.mul_(factor).clamp_(step_size_min, step_size_max)
    param.addcmul_(torch.sign(prev, out=factor), step_size, value=-1)
