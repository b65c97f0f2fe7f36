"""Spans: tensors that are neighbours in a slab, so that one operator can update all of them."""

from collections.abc import Sequence
from itertools import accumulate, groupby, repeat
from operator import is_not
from typing import Any, NamedTuple

from torch import Tensor

from tritonopt.slab import are_neighbours, filled, flattened

Columns = Sequence[Sequence[Tensor] | None]  # of parameters and state; None: not used


class Span(NamedTuple):
    """Tensors from `first` on that are neighbours in a slab, in each column; or one alone."""

    first: int
    offsets: list[int]  # in elements, of each tensor and of the end
    flats: list[Any]  # of each column, one-dimensional

    @classmethod
    def of(cls, columns: Any, some: Sequence[int]) -> "Span":
        first = some[0]
        offsets = list(accumulate((columns[0][index].numel() for index in some), initial=0))
        flats = [column and flattened(column[first], offsets[-1]) for column in columns]
        return cls(first, offsets, flats)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def part(self, some: Sequence[int]) -> list[Any]:
        """The memory of some neighbours in it."""
        if len(some) == len(self):
            return self.flats
        start, stop = self.offsets[some[0] - self.first], self.offsets[some[-1] - self.first + 1]
        return [None if flat is None else flat[start:stop] for flat in self.flats]


def spans(columns: Columns, limit: int, longest: int) -> tuple[list[Span], list[int]]:
    """Where tensors of the same index are neighbours in every column, and which have none.

    A span has `limit` elements at the most, a tensor in it `longest`. Empty ones are in neither.
    """
    used = [column for column in columns if column is not None]
    numels = [tensor.numel() for tensor in used[0]]
    sizes = [numel if numel <= longest else limit + 1 for numel in numels]

    def joins(index: int) -> bool:
        return all(are_neighbours(column[index - 1], column[index]) for column in used)

    runs = filled(range(len(numels)), sizes.__getitem__, limit, joins)
    joined = [Span.of(columns, run) for run in runs if len(run) > 1]
    return joined, [run[0] for run in runs if len(run) == 1 and numels[run[0]]]


def all_given(grads: Sequence[Tensor | None]) -> bool:
    return all(map(is_not, grads, repeat(None)))


def stretches(indices: Sequence[int], keys: Sequence[Any] | None) -> Sequence[Sequence[int]]:
    """Neighbours with the same key, without those whose key is None. No keys: all are together."""
    if keys is None:
        return (indices,)
    found = ((key, list(members)) for key, members in groupby(indices, keys.__getitem__))
    return [members for key, members in found if key is not None]
