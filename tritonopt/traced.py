"""The step inside a graph that torch.compile traces: tensors are written, nothing else.

Dynamo loses attributes that a traced step writes, and knows no addresses: there is no packing and
no layout here. Each group is one op, whose schema says what it mutates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tritonopt.layout import Layout

HAS_COMPLEX, STEPS_ARE_KNOWN = 1, 2
"""What `_init_group` tells the traced step, as bits: dynamo takes nothing but a constant."""


def step(optimizer: Any, closure: Callable[[], Any] | None) -> Any:
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
        for group in optimizer.param_groups:
            native: list[list[Any]] = [[] for _ in range(optimizer._lists)]
            rest: list[list[Any]] = [[] for _ in range(optimizer._lists)]
            for condition in optimizer._traced_conditions(group):
                if condition:  # branched on, so that dynamo guards it: it runs `_init_group` unseen
                    pass
            found = optimizer._init_group(group, *native, *rest)
            group = {**group, "foreach": group["foreach"] or False}
            pairs = detour(native, bool(found & STEPS_ARE_KNOWN))
            optimizer._traced_update(group, native, rest, bool(found & HAS_COMPLEX))
            for tensor, copy in pairs:
                tensor.copy_(copy)
    return loss


def fill(layout: Layout, lists: Sequence[list[Any]]) -> list[Tensor]:
    """Parameters that have a gradient, their gradients, state in the rule's order, and steps.

    Returns the parameters that are left to torch.
    """
    params, grads, *columns, steps = lists
    for bucket in layout.buckets:
        given = [i for i, param in enumerate(bucket.params) if param.grad is not None]
        params += [bucket.params[i] for i in given]
        grads += [bucket.params[i].grad for i in given]
        for key, column in zip(bucket.rule.all_keys, columns, strict=True):
            if key in bucket.rule.keys:
                column += [bucket.states[i][key] for i in given]
        steps += [bucket.states[i]["step"] for i in given]
    return [param for param, _ in layout.fallback]


def are_known(tensors: Sequence[Tensor]) -> bool:
    """Whether the graph that is being traced has any of the tensors already."""
    context = torch._guards.TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return False
    converter = context.fake_mode.fake_tensor_converter
    return any(converter._get_memo(tensor) is not None for tensor in tensors)


def loses_writes(tensor: Tensor) -> bool:
    """Whether torch.compile takes the tensor for a Python float that became a tensor.

    It forgets what operators of torch write there (torch 2.11 to 2.15), though not what ours do.
    """
    is_scalar = tensor.dim() == 0 and tensor.dtype == torch.float64 and tensor.device.type == "cpu"
    return is_scalar and not isinstance(tensor, torch.nn.Parameter)


def check_reads(tensors: Iterable[Any]) -> None:
    """Raises where neither the op nor its detour would be compiled rightly."""
    if are_known([t for t in tensors if isinstance(t, Tensor) and loses_writes(t)]):
        raise ValueError(
            "torch.compile does not get a float64 scalar right that a graph reads before the "
            "optimizer writes it: step outside of the compiled function"
        )


def detour(lists: Sequence[list[Any]], with_steps: bool) -> list[tuple[Tensor, Tensor]]:
    """Puts copies in the place of tensors without dimensions; the copies are copied back.

    Inductor computes what a graph returns of such a tensor, read before a custom op writes it,
    after the op (torch 2.11 to 2.15). Reads before a copy it gets right; it elides a mere clone.
    Steps are many, so they take part only where the graph may have read them. What would lose the
    copy back is left as it is: see `loses_writes`.
    """
    pairs = []
    params, _, *columns, steps = lists
    for column in (params, *columns, *([steps] if with_steps else [])):
        for index, tensor in enumerate(column):
            if tensor.dim() == 0 and not loses_writes(tensor):
                column[index] = tensor.neg().neg()
                pairs.append((tensor, column[index]))
    return pairs


def live(hyper: dict[str, Any]) -> dict[str, Any]:
    """Floats as tensors: a scheduler that changes them needs one graph more, not one a step."""
    one = torch.ones((), dtype=torch.float64, device="cpu")  # whatever the default device
    return {
        name: value if isinstance(value, (bool, Tensor)) else one * value
        for name, value in hyper.items()
    }
