"""The update rules in plain torch. They define correctness: the kernels are tested against them.

Each rule has the name, the argument order and the line order of its kernel in `kernels/`. All
tensors are flat and of one dtype, scratch included. The operations and their order are those of
torch's for-loop optimizers, so that fp32 and fp64 agree to the last bit.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tritonopt.precision import HALF, joined, rounded, split
from tritonopt.quantized import decoded, encoded

hardtanh_backward = torch.ops.aten.hardtanh_backward
threshold_backward = torch.ops.aten.threshold_backward

Variant = Literal["irprop-", "rprop-", "rprop+", "irprop+"]
VARIANTS = get_args(Variant)
LEAST = 1e-3  # mean of a mask, where nothing or hardly anything agrees: timm's


class Scratch:
    """Memory for intermediate results; None: operators allocate it, or a compiler fuses them."""

    def __init__(self, first: Tensor | None = None, second: Tensor | None = None) -> None:
        self.first, self.second = first, second
        self.chunks: tuple[Tensor, ...] = ()
        # Torch wakes all its threads to take the root of more than 2^11 elements, and for any other
        # operator on 2^15 or more. Roots of chunks stay on the calling thread, as the others do.
        if second is not None and 2**11 < len(second) < 2**15:
            self.chunks = second.split(2**11)

    def number(self, value: float) -> Any:
        """A factor or summand: as a tensor of their dtype it costs operators a third."""
        is_taken = self.second is not None and type(value) is float
        return number(value, self.second.dtype) if is_taken else value  # type: ignore[union-attr]

    def sqrt(self, x: Tensor) -> Tensor:
        """The square root, in the second, which may be `x` itself."""
        if not self.chunks or self.second is None or torch.get_num_threads() == 1:
            return torch.sqrt(x, out=self.second)
        self.second.copy_(x)
        torch._foreach_sqrt_(self.chunks)
        return self.second


def computed_in(param: Tensor) -> torch.dtype:
    return torch.float32 if param.dtype in HALF else param.dtype


def apply(
    rule: Callable[..., None], grad: Tensor, tensors: Sequence[Any], scratch: Scratch, hyper: Any,
    noise: Sequence[Tensor | None] = (),
) -> None:  # fmt: skip
    """A rule over one parameter and its state, `tensors`. What is half is rounded once.

    A last tensor of int16 has the lower halves of the parameter. Where the first state is of uint8,
    the last but for that has its scales. `noise`: by which random bits each tensor is rounded;
    None, or none at all: to nearest.
    """
    dtype = computed_in(tensors[0])
    low = tensors[-1] if tensors[-1] is not None and tensors[-1].dtype is torch.int16 else None
    tensors = tensors if low is None else tensors[:-1]
    code = scale = None
    if len(tensors) > 2 and tensors[1].dtype is torch.uint8:
        code, scale = tensors[1], tensors[-1]
        tensors = [tensors[0], decoded(code, scale), *tensors[2:-1]]
    work: list[Any] = [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]
    if low is not None:
        work[0] = joined(tensors[0], low)
    rule(work[0], grad.to(dtype), *work[1:], scratch, **hyper)
    if code is not None and scale is not None:
        for tensor, value in zip((code, scale), encoded(work[1], noise[1]), strict=True):
            tensor.copy_(value)
    if low is not None:
        work[0], rest = split(work[0])
        low.copy_(rest)
    for tensor, computed, bits in zip_longest(tensors, work, noise):
        if tensor is not None and tensor.dtype is not dtype:
            tensor.copy_(computed if bits is None else rounded(computed, bits))


def count(
    rule: Callable[..., None], grad: Tensor, tensors: Sequence[Any], scratch: Scratch, hyper: Any
) -> float:
    """How many elements the mask has of which a rule takes the `mean`. Nothing is changed."""
    counts: list[float] = []

    def mean(mask: Tensor) -> float:
        counts.append(float(mask.sum()))
        return 1.0

    copies = [tensor if tensor is None else tensor.clone() for tensor in tensors]
    apply(rule, grad, copies, scratch, {**hyper, "mean": mean})
    return counts[0]


@lru_cache(256)
@torch.inference_mode(False)
def number(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype, device="cpu")


def rmsprop_(
    param: Tensor, grad: Tensor, square_avg: Tensor, grad_avg: Tensor | None,
    momentum_buffer: Tensor | None, scratch: Scratch, *,
    lr: float, alpha: float, eps: float, weight_decay: float, momentum: float, maximize: bool,
    eps_in_sqrt: bool = False, lr_in_momentum: bool = False, nesterov: bool = False,
    decoupled_weight_decay: bool = False, nan_safe: bool = False, step: float | None = None,
    correction: float | None = None, cautious: bool = False, mean: Any = None,
) -> None:  # fmt: skip
    """For bias correction, `step` is the number of steps with this one; graphs, which would compute
    the power for every element, take the `correction` that follows from it. Graphs have tensors for
    numbers, too, about which they cannot decide: they compute both, and choose.
    `mean`, if it is cautious: of the mask over the tensor of which this is a part, or what takes
    it; None: this is a whole tensor."""
    if isinstance(lr, Tensor):
        lr = lr.double()  # type: ignore[assignment]  # its products are rounded as a float's
    decays = isinstance(weight_decay, Tensor) or weight_decay != 0
    if maximize:
        grad = torch.neg(grad, out=scratch.first)
    if decays and not decoupled_weight_decay:
        if isinstance(weight_decay, Tensor):  # 0 times an infinite parameter would be NaN
            decayed = torch.addcmul(grad, param, weight_decay.to(grad.dtype))
            grad = torch.where(weight_decay != 0, decayed, grad)
        else:
            grad = torch.add(grad, param, alpha=weight_decay, out=scratch.first)
    # sqrt(v / c) is sqrt(v) / sqrt(c): taken out of the denominator, bias correction changes
    # scalars only and costs nothing per element.
    gain, rate, inverse = 1.0, lr, 1.0
    if step is not None:
        correction = 1 - alpha**step
    if correction is not None:
        gain = correction**0.5
        rate, inverse = lr * gain, 1 / correction
        eps = eps * (correction if eps_in_sqrt else gain)
    square_avg.mul_(scratch.number(alpha)).addcmul_(grad, grad, value=1 - alpha)
    avg = square_avg
    if grad_avg is not None:
        _lerp_(grad_avg, grad, 1 - alpha)
        if isinstance(inverse, Tensor):  # dynamo would break the graph at a `value` of it
            avg = avg - inverse * grad_avg * grad_avg
        else:
            avg = torch.addcmul(avg, grad_avg, grad_avg, value=-inverse, out=scratch.second)
        if correction is not None or nan_safe:
            avg.clamp_min_(0)  # 0 of a constant gradient, where rounding may fall below
    if eps_in_sqrt:
        avg = scratch.sqrt(torch.add(avg, scratch.number(eps), out=scratch.second))
    else:
        avg = scratch.sqrt(avg).add_(scratch.number(eps))
    if decays and decoupled_weight_decay:
        param.mul_(scratch.number(1 - lr * weight_decay))
    if momentum_buffer is not None:
        scale = -1.0 if lr_in_momentum else -lr
        value = rate if lr_in_momentum else gain
        momentum_buffer.mul_(scratch.number(momentum)).addcdiv_(grad, avg, value=value)
        if cautious:
            update = momentum_buffer
            if nesterov:
                update = torch.div(grad, avg, out=scratch.second).mul_(value)
                update = update.add_(momentum_buffer, alpha=momentum)
            param.add_(_masked(update, grad, scratch, mean), alpha=scale)
            return
        if nesterov:
            param.addcdiv_(grad, avg, value=-rate)
            scale = scale * momentum
        param.add_(momentum_buffer, alpha=scale)
    else:
        param.addcdiv_(grad, avg, value=-rate)


def _masked(update: Tensor, grad: Tensor, scratch: Scratch, mean: Any) -> Tensor:
    """The update where it has the gradient's sign, divided by the mean of that mask; else 0."""
    mask = torch.mul(update, grad, out=scratch.first).gt_(0)
    if mean is None:
        mean = mask.mean()
    elif callable(mean):
        mean = mean(mask)
    mean = mean.clamp(min=LEAST) if isinstance(mean, Tensor) else max(mean, LEAST)
    return torch.mul(update, mask.div_(mean), out=scratch.second)


def _lerp_(start: Tensor, end: Tensor, weight: float) -> None:
    if isinstance(weight, Tensor):  # from the nearer end, as torch does
        weight = weight.to(start.dtype)
        near, way = weight.abs() < 0.5, end - start
        start.copy_(torch.where(near, start, end) + torch.where(near, weight, weight - 1) * way)
    else:
        start.lerp_(end, weight)


def rprop_(
    param: Tensor, grad: Tensor, prev: Tensor, step_size: Tensor, scratch: Scratch, *,
    etaminus: float, etaplus: float, step_size_min: float, step_size_max: float, maximize: bool,
    variant: str = "irprop-", loss_rose: bool = False,
) -> None:  # fmt: skip
    if maximize:
        grad = torch.neg(grad, out=scratch.first)
    product = torch.mul(grad, prev, out=scratch.second)
    factor = _factor(product, scratch.number(float("inf")), etaminus, etaplus)
    if variant == "rprop+" or (variant == "irprop+" and loss_rose):
        hardtanh_backward.grad_input(prev, factor, 0.0, 1.0, grad_input=prev)
        param.addcmul_(prev.sign_(), step_size)  # on a change of sign: the last update, taken back
    if variant == "rprop-":
        prev.copy_(grad)
    elif isinstance(etaminus, Tensor):
        prev.copy_(torch.where(factor > etaminus, grad, 0.0))
    else:
        threshold_backward.grad_input(grad, factor, etaminus, grad_input=prev)
    step_size.mul_(factor).clamp_(step_size_min, step_size_max)
    param.addcmul_(torch.sign(prev, out=factor), step_size, value=-1)


def _factor(product: Tensor, infinity: Any, etaminus: float, etaplus: float) -> Tensor:
    """By which step sizes grow or shrink; in place. A product that is NaN counts as 0.

    No comparison, where or masked_fill: on a CPU each costs 5 to 50 times a multiply, but not if
    fused. The product times infinity is an infinity or NaN, each of which nan_to_num gives a value
    of its own. The rule tells them apart again by the backward of threshold and of hardtanh, which
    pass a gradient on where x > bound, or low < x < high.
    """
    if torch.compiler.is_compiling():
        one = torch.ones_like(product)
        return torch.where(product > 0, etaplus, torch.where(product < 0, etaminus, one))
    return torch.nan_to_num_(product.mul_(infinity), 1.0, etaplus, etaminus)
