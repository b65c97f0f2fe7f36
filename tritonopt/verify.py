"""Whether many tensors are still what they were, and where they were: asked at every step."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

from tritonopt.eligible import is_plain

CHUNK = 512
"""Tensors of which one look warms the cache for the next: 4000 fill more than a core's."""

Guards = dict[Any, Callable[..., bool]]


class Geometry:
    """What tensors are: plain or not, of which dtype, device, sizes and strides, lazily negated."""

    def __init__(self, tensors: Sequence[Tensor], guards: Guards) -> None:
        """`guards`: those that were made, so that columns of equal tensors share one in cache."""
        self.count = len(tensors)
        self.chunks = []
        for where in (slice(first, first + CHUNK) for first in range(0, self.count, CHUNK)):
            looks = list(_looks(tensors[where]))
            key = *looks, *map(type, tensors[where])
            if key not in guards:
                guards[key] = guard(tensors[where])
            self.chunks.append((where, looks, guards[key]))

    def fits(self, tensors: Sequence[Tensor], at: Sequence[int] | None = None) -> bool:
        """Whether these tensors are so, and lie at these addresses, if given."""
        if len(tensors) != self.count:
            return False
        for where, looks, is_alike in self.chunks:
            some = tensors[where]
            if at is not None and addresses(some) != at[where]:
                return False
            if not is_alike(*some) and list(_looks(some)) != looks:
                return False
        return True


def guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """What says whether others have the type, dtype, device, sizes, strides and lazy negation.

    Dynamo's own check, at 40 ns a tensor: attribute by attribute it costs four times that. It says
    no too often (of None, and it looks at autocast and inference mode, too), never yes wrongly.
    """
    sizes: Any = [list(t.size()) for t in tensors]
    strides: Any = [list(t.stride()) for t in tensors]
    with torch.no_grad():  # as in the step: it notes whether a gradient is required
        guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    return guards.check


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _looks(tensors: Sequence[Tensor]) -> Iterator[tuple[Any, ...]]:
    for t in tensors:
        yield is_plain(t), t.dtype, t.device, t.size(), t.stride(), t.is_neg()
