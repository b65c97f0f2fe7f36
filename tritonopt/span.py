"""Spans: tensors that are neighbours in a slab, so that one operator can update all of them."""

from collections.abc import Sequence
from itertools import accumulate, groupby, repeat
from operator import is_not
from typing import NamedTuple

from torch import Tensor

from tritonopt.slab import find


class Span(NamedTuple):
    """Tensors from `first` on that are neighbours in a slab, in each of some lists."""

    first: int
    offsets: list[int]  # in elements, of each tensor and of the end
    flats: list[Tensor | None]  # one-dimensional, over all of them; None for an unused list

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def part(self, some: Sequence[int]) -> list[Tensor | None]:
        """The memory of some neighbours in it."""
        if len(some) == len(self):
            return self.flats
        start, stop = self.offsets[some[0] - self.first], self.offsets[some[-1] - self.first + 1]
        return [None if flat is None else flat[start:stop] for flat in self.flats]


def spans(
    columns: Sequence[Sequence[Tensor] | None], limit: int, longest: int
) -> tuple[list[Span], list[int]]:
    """Where tensors of the same index are neighbours in every column, and which have none.

    A span has `limit` elements at the most, a tensor in it `longest`. Empty ones are in neither.
    """
    used = [column for column in columns if column is not None]
    runs: list[list[int]] = []
    room, ends = 0, None
    for index, tensor in enumerate(used[0]):
        numel = tensor.numel()
        if numel == 0:
            ends = None
            continue
        starts = [column[index].data_ptr() for column in used]
        if starts == ends and numel <= min(room, longest) and _share_slabs(used, index):
            runs[-1].append(index)
        else:
            runs.append([index])
            room = limit if numel <= longest else 0
        room -= numel
        ends = [s + numel * c[0].itemsize for s, c in zip(starts, used, strict=True)]
    joined = []
    for run in runs:
        if len(run) > 1:
            offsets = list(accumulate((used[0][index].numel() for index in run), initial=0))
            flats = [None if c is None else _from(c[run[0]], offsets[-1]) for c in columns]
            joined.append(Span(run[0], offsets, flats))
    return joined, [run[0] for run in runs if len(run) == 1]


def _share_slabs(columns: Sequence[Sequence[Tensor]], index: int) -> bool:
    """Whether each tensor at `index` is a piece of the slab of the one before it."""
    pairs = [(find(column[index - 1]), find(column[index])) for column in columns]
    return all(left is not None and left is right for left, right in pairs)


def _from(first: Tensor, numel: int) -> Tensor:
    """The elements of a slab from a piece of it on."""
    slab = find(first)
    assert slab is not None
    start = (first.data_ptr() - slab.data_ptr()) // slab.itemsize
    return slab[start : start + numel]


def all_given(grads: Sequence[Tensor | None]) -> bool:
    return all(map(is_not, grads, repeat(None)))


def stretches(indices: Sequence[int], keys: Sequence[object] | None) -> Sequence[Sequence[int]]:
    """Neighbours in a list of indices with the same key, without those whose key is None.

    `keys` None: they all have the same.
    """
    if keys is None:
        return (indices,)
    found = ((key, list(members)) for key, members in groupby(indices, keys.__getitem__))
    return [members for key, members in found if key is not None]
