"""What gradients are multiplied by inside the step: a loss scale undone, a global norm clipped."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from tritonopt.device import path
from tritonopt.eligible import HALF_OR_SINGLE
from tritonopt.shard import is_sharded


def is_number(value: Any) -> bool:
    """Whether it is one real number; what a tensor holds, the host does not wait for."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    if type(value) is float:
        return True
    try:
        float(value)
        return not isinstance(value, str) and getattr(value, "ndim", 0) == 0
    except (TypeError, ValueError, OverflowError):
        return False


def checked_limit(limit: Any) -> Any:
    if limit is None or (isinstance(limit, Tensor) and not limit.is_cpu and is_number(limit)):
        return limit
    if not is_number(limit) or not limit > 0:
        raise ValueError(f"Invalid max_grad_norm value: {limit!r}")
    return limit if isinstance(limit, Tensor) else float(limit)


def clipped(norm: Tensor, max_norm: float, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm of gradients that count `factor` times, and how often they count once clipped.

    Tensors with one element, so that nothing waits for the device.
    """
    norm = norm if factor is None else norm * factor.to(norm.device)
    clip = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as clip_grad_norm_
    return norm, clip if factor is None else clip * factor.to(norm.device)


def total_norm(work: Sequence[tuple[Any, Sequence[Any]]]) -> Tensor:
    """The 2-norm of all gradients: in kernels by one launch for each device and dtype; elsewhere,
    and for shards, whose norm is that of all ranks, as torch computes it."""
    rest: list[Tensor | None] = []
    scattered: dict[Any, Any] = defaultdict(lambda: ([], []))  # gradients, their numels
    for known, grads in work:
        rest += [param.grad for param, _ in known.fallback]
        for part in known.plan.parts if known.plan is not None else ():
            if known.sharded or path(part.device)[0] != "kernel":
                rest += [known.native[index].grad for index in part.indices]
            else:
                tensors, numels = scattered[part.grad_dtype, part.device]
                tensors += [grads[index] for index in part.indices]
                numels += part.update.numels
    # In fp32: in half precision the norm of gradients that are still scaled may be infinite.
    given = [g.float() if g.dtype in HALF_OR_SINGLE else g for g in rest if g is not None]
    norm: Any = get_total_norm(given)
    norm = norm.full_tensor() if is_sharded(norm) else norm
    if not scattered:
        return norm
    from tritonopt.kernels.launch import square_sum

    squares = [square_sum(*lists, *kind) for kind, lists in scattered.items()]
    squares += [norm**2] if given else []
    if len(squares) == 1:
        return squares[0].sqrt()
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


@contextmanager
def scaled(params: Sequence[Tensor], factor: Tensor | None) -> Iterator[None]:
    """For torch's own implementation: scaled gradients stand in for those of `params`."""
    grads = [param.grad for param in params]
    try:
        for param, grad in zip(params, grads, strict=True):
            if grad is not None and factor is not None:  # 0-dim, it would take the factor's dtype
                param.grad = (grad * factor.to(grad.device)).to(grad.dtype)
        yield
    finally:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
