"""Turns torch's optimizers into ours where they stand."""

from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler

from tritonopt.rmsprop import RMSprop
from tritonopt.rprop import Rprop

OURS: dict[type, type[RMSprop | Rprop]] = {torch.optim.RMSprop: RMSprop, torch.optim.Rprop: Rprop}


def from_torch(optimizer: Optimizer, compile: bool | dict[str, Any] = False) -> RMSprop | Rprop:
    """Turns a `torch.optim.RMSprop` or `Rprop` into ours, in the middle of a training or before.

    The object stays the same one, for schedulers and whoever else holds it; param groups, state and
    hooks are kept. A group with ``foreach=True`` or ``False`` still selects torch's implementation.

    Args:
        optimizer: of exactly one of these two classes; it is returned. One of ours is as it was.
        compile: as of :class:`tritonopt.RMSprop`.

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
    if type(optimizer) not in OURS:
        kind = type(optimizer)
        raise TypeError(f"from_torch takes torch.optim.RMSprop or Rprop, no subclass: not {kind}")
    step = vars(optimizer).get("step")
    # Where it was made: other wrappers may have copied the mark of a scheduler's.
    if step is not None and getattr(step, "__globals__", None) is not vars(lr_scheduler):
        raise TypeError("its step was replaced by something: undo that, or call from_torch before")
    vars(optimizer).pop("step", None)  # our class's does itself what the wrapper does
    optimizer.__class__ = OURS[type(optimizer)]
    assert isinstance(optimizer, (RMSprop, Rprop))
    optimizer._patch_step_function()  # hooks and profiler names, once per class
    optimizer._begin(optimizer._options, compile)
    return optimizer
