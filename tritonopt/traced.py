"""The step inside a graph that torch.compile traces: tensors are written, nothing else.

Dynamo loses attributes that a traced step writes, and knows no addresses: there is no packing and no
layout here. Each group is one op, whose schema says what it mutates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tritonopt.layout import Layout


def step(optimizer: Any, closure: Callable[[], Any] | None) -> Any:
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
        for group in optimizer.param_groups:
            native: list[list[Any]] = [[] for _ in range(optimizer._lists)]
            rest: list[list[Any]] = [[] for _ in range(optimizer._lists)]
            has_complex = optimizer._init_group(group, *native, *rest)
            group = {**group, "foreach": group["foreach"] or False}
            optimizer._traced_update(group, native, rest, has_complex)
    return loss


def fill(layout: Layout, lists: Sequence[list[Any]]) -> None:
    """Parameters that have a gradient, their gradients, state in the rule's order, and steps."""
    params, grads, *columns, steps = lists
    for bucket in layout.buckets:
        given = [(p, s) for p, s in zip(bucket.params, bucket.states, strict=True) if p.grad is not None]
        params += [param for param, _ in given]
        grads += [param.grad for param, _ in given]
        for key, column in zip(bucket.rule.all_keys, columns, strict=True):
            if key in bucket.rule.keys:
                column += [state[key] for _, state in given]
        steps += [state["step"] for _, state in given]


def live(hyper: dict[str, Any]) -> dict[str, Any]:
    """Floats as tensors, so that a scheduler that changes them needs one graph more, not one a step."""
    one = torch.ones((), dtype=torch.float64)
    return {
        name: value if isinstance(value, (bool, torch.Tensor)) else one * value
        for name, value in hyper.items()
    }
