"""Whether many tensors are still what they were, and where they were: asked at every step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

from tritonopt.eligible import is_plain

CHUNK = 512  # tensors of which one look warms the cache for the next: 4000 fill more than a core's
RECENT_GUARDS = 64
_guards: dict[Any, Callable[..., bool]] = {}  # shared by equal lists, as their memory is far larger


class Geometry:
    """What tensors are: plain or not, of which dtype, device, sizes and strides, lazily negated."""

    def __init__(self, lists: Sequence[Sequence[Tensor]]) -> None:
        self.counts = [*map(len, lists)]
        self.chunks = []
        for number, tensors in enumerate(lists):
            for where in (slice(i, i + CHUNK) for i in range(0, len(tensors), CHUNK)):
                looks = _looks(tensors[where])
                kind = *looks, *map(type, tensors[where])
                if kind not in _guards:
                    if len(_guards) >= RECENT_GUARDS:
                        _guards.clear()
                    _guards[kind] = guard(tensors[where])
                self.chunks.append((number, where, looks, _guards[kind]))

    def fits(
        self, lists: Sequence[Sequence[Tensor]], at: Sequence[Sequence[int]] | None = None
    ) -> bool:
        """Whether these tensors are so, and lie at these addresses, if given."""
        if [*map(len, lists)] != self.counts:
            return False
        for number, where, looks, is_alike in self.chunks:
            tensors = lists[number][where]
            if at is not None and addresses(tensors) != at[number][where]:
                return False
            if not is_alike(*tensors) and _looks(tensors) != looks:
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


def _looks(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    kinds = [(is_plain(t), t.is_neg(), t.is_inference(), t.dtype, t.device) for t in tensors]
    return [(*kind, t.size(), t.stride()) for kind, t in zip(kinds, tensors, strict=True)]
