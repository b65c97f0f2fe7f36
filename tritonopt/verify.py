"""Whether many tensors are still what they were, and where they were: asked at every step."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from itertools import compress, repeat
from operator import is_not
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch.overrides import TorchFunctionMode

from tritonopt.shard import locals_of


class Guards:
    """Checks type, dtype, device, sizes, strides and lazy negation of many tensors, at 40 ns each.

    Dynamo's own check: attribute by attribute it costs four times that. It says no too often (it
    looks at autocast and inference mode, too), never yes wrongly; after a no, every tensor is
    looked at in turn.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        given = [t for t in tensors if t is not None]
        self.of_all = len(given) == len(tensors)
        self._given = [] if self.of_all else _given(tensors)
        sizes: Any = [list(t.size()) for t in given]
        strides: Any = [list(t.stride()) for t in given]
        with torch.no_grad():  # as in the step: they note whether a gradient is required
            guards = TensorGuards(*given, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self._check = guards.check

    def fit(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether the same ones are None, and the others as they were."""
        if self.of_all:
            return self._check(*tensors)
        return _given(tensors) == self._given and self._check(*compress(tensors, self._given))


class _Differ(TorchFunctionMode):
    """Tensors that are asked whether they are equal say no; and whether any was asked anything."""

    asked = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked = True  # a subclass may compare in its own way
        if func is Tensor.__eq__:
            return False
        return func(*args, **(kwargs or {}))  # a signal's handler, or a finalizer


def same(found: Any, known: Any) -> bool:
    """Whether lists and dicts, nested or not, hold the very same tensors, at 2 to 8 ns each.

    They take what is identical for equal and ask only the rest. `is` over the tensors, fetched one
    by one, costs ten times that. It may say no wrongly.
    """
    if torch._C._is_torch_function_all_disabled():
        return False
    try:
        with _Differ() as mode:
            return bool(found == known) and not mode.asked
    except (TypeError, ValueError, RuntimeError):  # of what else lies in a state: arrays raise
        return False


def copied(entry: Any) -> Any:
    """An entry of state to compare later ones with; what equals none if that would say nothing."""
    known = type(entry) in (dict, OrderedDict, defaultdict)
    return dict(entry) if known else object()


class Place:
    """Where tensors lie and how: in chunks, of which the first look warms the cache for the second.

    4000 tensors with their storages fill more than a core's own cache.
    """

    CHUNK = 512

    def __init__(self, tensors: Sequence[Tensor], sharded: bool) -> None:
        self.sharded = sharded
        self._chunks = []
        for first in range(0, len(tensors), self.CHUNK):
            given = (*tensors[first : first + self.CHUNK],)
            chunk = locals_of(given, sharded)
            self._chunks.append((given, addresses(chunk), Guards(chunk), geometry(chunk)))

    def holds(self) -> bool:
        """Whether the tensors still lie there in the same way."""
        try:
            for given, known, guards, look in self._chunks:
                chunk = locals_of(given, self.sharded)  # a DTensor may have got another part
                if addresses(chunk) != known:
                    return False
                if not guards.fit(chunk) and geometry(chunk) != look:
                    return False
        except (TypeError, RuntimeError):  # of what is no tensor, or has no memory
            return False
        return True


def _given(tensors: Sequence[Tensor | None]) -> list[bool]:
    return list(map(is_not, tensors, repeat(None)))


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def geometry(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(type(t), t.dtype, t.device, t.size(), t.stride(), t.is_neg()) for t in tensors]
