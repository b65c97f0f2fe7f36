"""Spans: tensors that are neighbours in a slab, so that one operator can update all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby, repeat
from operator import is_not
from typing import NamedTuple

from torch import Tensor

from tritonopt.slab import ALIGNMENT, find, pitch


class Span(NamedTuple):
    """Tensors from `first` on that are neighbours in a slab, in each of some lists."""

    first: int
    offsets: list[int]  # in elements, of each tensor and of the end
    flats: list[Tensor | None]  # one-dimensional, over all of them; None for an unused list

    def __len__(self) -> int:
        return len(self.offsets) - 1


def spans(
    columns: Sequence[Sequence[Tensor] | None],
    limit: int,
    longest: int,
    alignment: int = ALIGNMENT,
) -> tuple[list[Span], list[int]]:
    """Where tensors of the same index are neighbours in every column, and which have none.

    A span has `limit` elements at the most, a tensor in it `longest`. Empty ones are in neither.
    """
    used = [column for column in columns if column is not None]
    itemsize = used[0][0].itemsize
    pitches = [pitch(t.numel(), itemsize, alignment) for t in used[0]]
    joined, alone = [], []
    for run in _runs(used, pitches, limit, longest):
        if len(run) == 1:
            alone += run
            continue
        offsets = list(accumulate((pitches[index] for index in run), initial=0))
        flats = [None if c is None else _flat(c[run[0]], offsets[-1]) for c in columns]
        joined.append(Span(run[0], offsets, flats))
    return joined, alone


def _runs(
    columns: Sequence[Sequence[Tensor]], pitches: list[int], limit: int, longest: int
) -> list[list[int]]:
    """The indices in order, without those of empty tensors, in runs of neighbours."""
    itemsize = columns[0][0].itemsize
    one_dtype = len({column[0].dtype for column in columns}) == 1
    addresses = [[tensor.data_ptr() for tensor in column] for column in columns]

    def adjacent(left: int, right: int) -> bool:
        if not one_dtype or max(pitches[left], pitches[right]) > longest:
            return False
        distance = pitches[left] * itemsize
        if any(places[right] - places[left] != distance for places in addresses):
            return False
        homes = [(find(column[left]), find(column[right])) for column in columns]
        return all(home is not None and home is other for home, other in homes)

    runs: list[list[int]] = []
    length = 0
    for index, tensor in enumerate(columns[0]):
        if tensor.numel() == 0:
            continue
        length += pitches[index]
        if runs and length <= limit and runs[-1][-1] == index - 1 and adjacent(index - 1, index):
            runs[-1].append(index)
        else:
            runs.append([index])
            length = pitches[index]
    return runs


def _flat(first: Tensor, numel: int) -> Tensor:
    """The elements of a slab from a piece of it on."""
    home = find(first)
    assert home is not None
    return home.flat(first.data_ptr(), numel)


def all_given(grads: Sequence[Tensor | None]) -> bool:
    return all(map(is_not, grads, repeat(None)))


def stretches(indices: Sequence[int], keys: Sequence[object] | None) -> Iterable[Sequence[int]]:
    """Neighbours in a list of indices with the same key, without those whose key is None.

    `keys` None: they all have the same.
    """
    if keys is None:
        return (indices,)
    found = ((key, list(members)) for key, members in groupby(indices, keys.__getitem__))
    return [members for key, members in found if key is not None]
