"""Turns torch's optimizers into ours where they stand."""

from typing import Any

import torch
from torch.optim import lr_scheduler

from tritonopt.rmsprop import RMSprop
from tritonopt.rprop import Rprop

OURS: dict[type, type[RMSprop] | type[Rprop]] = {
    torch.optim.RMSprop: RMSprop,
    torch.optim.Rprop: Rprop,
}


def from_torch(optimizer: torch.optim.Optimizer) -> RMSprop | Rprop:
    """Turns a `torch.optim.RMSprop` or `Rprop` into ours, in the middle of a training or before.

    The object stays the same one, so that schedulers, loops and whoever else holds it need not
    know; param groups, state and hooks are kept. A group with ``foreach=True`` or ``False`` goes on
    to select torch's own implementation.

    Args:
        optimizer: of exactly one of these two classes. One of ours is returned as it is.

    Returns:
        `optimizer`, now a `tritonopt.RMSprop` or `tritonopt.Rprop`.

    Raises:
        TypeError: it is of another class (a subclass may do something else), or its `step` was
            replaced by something else than a scheduler's wrapper.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01)
        >>> optimizer = tritonopt.from_torch(optimizer)
    """
    if isinstance(optimizer, (RMSprop, Rprop)):
        return optimizer
    ours = OURS.get(type(optimizer))
    if ours is None:
        kinds = "torch.optim.RMSprop or torch.optim.Rprop"
        raise TypeError(f"from_torch takes {kinds}, not {type(optimizer)!r}")
    wrapped = vars(optimizer).get("step")
    if wrapped is not None and not _is_by_scheduler(wrapped):
        raise TypeError("the optimizer's step was replaced: call from_torch before that")
    vars(optimizer).pop("step", None)  # our class's does itself what the wrapper does
    optimizer.__class__ = ours
    assert isinstance(optimizer, (RMSprop, Rprop))
    optimizer._adopt()
    return optimizer


def _is_by_scheduler(step: Any) -> bool:
    """Whether a scheduler wrapped it last: other wrappers may have copied the mark."""
    made_in = getattr(step, "__globals__", {}).get("__name__")
    return made_in == lr_scheduler.__name__ and hasattr(step, "_wrapped_by_lr_sched")
