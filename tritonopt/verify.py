"""Whether many tensors are still what they were, and where they were: asked at every step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress, repeat
from operator import is_not
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

from tritonopt.eligible import is_plain


class Guards:
    """Checks type, dtype, device, sizes, strides and lazy negation of many tensors, at 40 ns each.

    Dynamo's own check: attribute by attribute it costs four times that. It says no too often (it
    looks at autocast and inference mode, too), never yes wrongly; after a no, every tensor is
    looked at in turn.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        given = [t for t in tensors if t is not None]
        self._given = [] if len(given) == len(tensors) else _mask(tensors)
        sizes: Any = [list(t.size()) for t in given]
        strides: Any = [list(t.stride()) for t in given]
        with torch.no_grad():  # as in the step: they note whether a gradient is required
            guards = TensorGuards(*given, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self._check = guards.check

    def fit(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether the same ones are None, and the others as they were."""
        if not self._given:
            return self._check(*tensors)
        return _mask(tensors) == self._given and self._check(*compress(tensors, self._given))


def _mask(tensors: Sequence[Tensor | None]) -> list[bool]:
    return list(map(is_not, tensors, repeat(None)))


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def chunks(count: int) -> list[slice]:
    """Of tensors of which one look warms the cache for the next: 4000 fill more than a core's."""
    return [slice(first, first + 512) for first in range(0, count, 512)]


def geometry(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(is_plain(t), t.dtype, t.device, t.size(), t.stride(), t.is_neg()) for t in tensors]
