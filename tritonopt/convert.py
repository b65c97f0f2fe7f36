"""Turns optimizers of torch, timm and Stable-Baselines3 into ours where they stand."""

from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler

from tritonopt.libraries import TENSORFLOW_LIKE, like_tensorflow
from tritonopt.rmsprop import RMSprop
from tritonopt.rprop import Rprop

OURS: dict[type, type[RMSprop | Rprop]] = {torch.optim.RMSprop: RMSprop, torch.optim.Rprop: Rprop}


def counterpart(optimizer: Optimizer) -> type[RMSprop | Rprop] | None:
    """The class of ours that an optimizer is of, or can be turned into."""
    kind = type(optimizer)
    if issubclass(kind, (RMSprop, Rprop)):
        return kind
    name = f"{kind.__module__}.{kind.__qualname__}"
    return RMSprop if name in TENSORFLOW_LIKE else OURS.get(kind)


def from_torch(optimizer: Optimizer, compile: bool | dict[str, Any] = False) -> RMSprop | Rprop:
    """Turns a `torch.optim.RMSprop` or `Rprop` into ours, in the middle of a training or before.

    Timm's `RMSpropTF` and Stable-Baselines3's `RMSpropTFLike` become ours, too, with options that
    make ours the same rule. The object stays the same one, for schedulers and whoever else holds
    it; param groups, state and hooks are kept. A group of torch's with ``foreach=True`` or
    ``False`` still selects torch's implementation.

    Args:
        optimizer: of exactly one of these classes, or one of ours; it is returned.
        compile: as of :class:`tritonopt.RMSprop`.

    Raises:
        TypeError: it is of another class (a subclass may do something else), or its `step` was
            replaced by something else than a scheduler's wrapper.
        ValueError: it is timm's with ``corrected_weight_decay``, or an option has a wrong value.
            Whatever is raised, the optimizer is what it was.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01)
        >>> optimizer = tritonopt.from_torch(optimizer)
    """
    if isinstance(optimizer, (RMSprop, Rprop)):
        if compile:
            optimizer.compile(**({} if compile is True else compile))
        return optimizer
    kind, ours = type(optimizer), counterpart(optimizer)
    if ours is None:
        known = "torch's RMSprop and Rprop, timm's RMSpropTF, Stable-Baselines3's RMSpropTFLike"
        raise TypeError(f"from_torch takes {known}, no subclass: not {kind}")
    step = vars(optimizer).get("step")
    # Where it was made: other wrappers may have copied the mark of a scheduler's.
    if step is not None and getattr(step, "__globals__", None) is not vars(lr_scheduler):
        raise TypeError("its step was replaced by something: undo that, or call from_torch before")
    groups = [optimizer.defaults, *optimizer.param_groups]
    before = dict(vars(optimizer)), [*map(dict, groups)]
    try:
        for group, old in zip(groups, before[1], strict=True):
            group.clear()
            if kind not in OURS:
                group.update(like_tensorflow(old))
            else:
                group.update((x, old[x]) for x in old if x not in ours._options)  # not in force
        vars(optimizer).pop("step", None)  # our class's does itself what the wrapper does
        optimizer.__class__ = ours
        assert isinstance(optimizer, (RMSprop, Rprop))
        optimizer.__setstate__({})  # hooks and profiler names, once per class; counts of steps
        optimizer._begin(optimizer._options, compile)
    except BaseException:
        optimizer.__class__ = kind
        vars(optimizer).clear()
        vars(optimizer).update(before[0])
        for group, old in zip(groups, before[1], strict=True):
            group.clear()
            group.update(old)
        raise
    return optimizer
