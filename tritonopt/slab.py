"""Slabs: contiguous memory handed out in pieces that each own a storage.

A slab is a layout, never the truth. Parameters and state tensors may be moved or replaced by
anyone at any time; whoever uses a slab asks `find` where a tensor lies *now*.
"""

from __future__ import annotations

import bisect
import threading
import weakref
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate, groupby, repeat
from operator import is_not
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 128
"""Bytes from one possible start of a piece to the next: a GPU cache line."""

MAX_BYTES = 2**28
"""Packing holds a slab's parameters twice for a moment: this bounds what that costs."""


class Slab:
    """One contiguous allocation. It lives, and is found, while any piece of it does."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        self.memory = torch.zeros(numel, dtype=dtype, device=device)
        self.start = self.memory.data_ptr()
        self.end = self.start + numel * dtype.itemsize
        with _lock:
            position = bisect.bisect(_starts, self.start)
            _starts.insert(position, self.start)
            _slabs.insert(position, weakref.ref(self, _forget))

    def flat(self, address: int, numel: int) -> Tensor:
        """The `numel` elements that begin at `address`, one-dimensional."""
        first = (address - self.start) // self.memory.itemsize
        return self.memory[first : first + numel]


_lock = threading.RLock()  # reentrant: a collection inside the critical section may call _forget
_starts: list[int] = []
_slabs: list[weakref.ref[Slab]] = []


def _forget(reference: weakref.ref[Slab]) -> None:
    with _lock:
        position = _slabs.index(reference)
        del _slabs[position], _starts[position]


def find(tensor: Tensor) -> Slab | None:
    """The slab of the tensor's dtype and device of which it is a piece, if there is one.

    A view of a part of a piece is none: what follows it is not padding but the rest of the piece.
    """
    address = tensor.data_ptr()
    with _lock:
        position = bisect.bisect(_starts, address) - 1
        slab = _slabs[position]() if position >= 0 else None
    if slab is None or not slab.start <= address < slab.end:
        return None
    same = slab.memory.dtype == tensor.dtype and slab.memory.device == tensor.device
    return slab if same and _fills_storage(tensor) else None


def _fills_storage(tensor: Tensor) -> bool:
    nbytes = tensor.numel() * tensor.itemsize
    return bool(tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == nbytes)


def pitch(numel: int, dtype: torch.dtype, alignment: int = ALIGNMENT) -> int:
    """Elements from the start of a piece of `numel` elements to the start of its neighbour."""
    lane = max(alignment // dtype.itemsize, 1)
    return -(-numel // lane) * lane


def batches(tensors: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Sequence[Tensor]]:
    """The tensors in order, in batches of which each fits one slab."""
    first, total = 0, 0
    for index, tensor in enumerate(tensors):
        size = pitch(tensor.numel(), dtype) * dtype.itemsize
        if index > first and total + size > MAX_BYTES:
            yield tensors[first:index]
            first, total = index, 0
        total += size
    yield tensors[first:]


@torch.inference_mode(False)  # an inference tensor could not be updated outside of that mode
def allocate(
    like: Sequence[Tensor], dtype: torch.dtype, device: torch.device, alignment: int = ALIGNMENT
) -> tuple[list[Tensor], Slab]:
    """Zeros of the shapes and strides of `like`, side by side in one slab.

    Every piece has a storage of its own and of its own size, so that saving, resizing or sharing
    one concerns no other. It keeps the slab alive.
    """
    pitches = [pitch(t.numel(), dtype, alignment) for t in like]
    slab = Slab(sum(pitches), dtype, device)
    pieces = []
    for tensor, offset in zip(like, accumulate(pitches, initial=0), strict=False):
        piece = slab.memory.as_strided(tensor.size(), tensor.stride(), offset)
        piece.slab = slab  # type: ignore[attr-defined]  # the capsule holds the tensor and this
        pieces.append(torch.from_dlpack(torch.utils.dlpack.to_dlpack(piece)))
    return pieces, slab


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
    homes = [[find(tensor) for tensor in column] for column in used]
    ends = [
        [t.data_ptr() + pitch(t.numel(), t.dtype, alignment) * t.itemsize for t in column]
        for column in used
    ]
    pitches = [pitch(t.numel(), t.dtype, alignment) for t in used[0]]
    one_dtype = len({column[0].dtype for column in used}) == 1

    def adjacent(left: int, right: int) -> bool:
        if not one_dtype or max(pitches[left], pitches[right]) > longest:
            return False
        return all(
            home[left] is not None
            and home[left] is home[right]
            and end[left] == column[right].data_ptr()
            for home, end, column in zip(homes, ends, used, strict=True)
        )

    runs: list[list[int]] = []
    length = 0
    for index, tensor in enumerate(used[0]):
        if tensor.numel() == 0:
            continue
        length += pitches[index]
        if runs and length <= limit and runs[-1][-1] == index - 1 and adjacent(index - 1, index):
            runs[-1].append(index)
        else:
            runs.append([index])
            length = pitches[index]

    joined, alone = [], []
    for run in runs:
        if len(run) == 1:
            alone.append(run[0])
            continue
        offsets = list(accumulate((pitches[i] for i in run), initial=0))
        flats: list[Tensor | None] = []
        for column in columns:
            home = None if column is None else find(column[run[0]])
            if column is None or home is None:
                flats.append(None)
            else:
                flats.append(home.flat(column[run[0]].data_ptr(), offsets[-1]))
        joined.append(Span(run[0], offsets, flats))
    return joined, alone


def all_given(grads: Sequence[Tensor | None]) -> bool:
    return all(map(is_not, grads, repeat(None)))


def present(span: Span, grads: Sequence[Tensor | None]) -> Iterator[slice]:
    """The stretches of a span, counted from its start, in which every tensor has a gradient."""
    own = grads[span.first : span.first + len(span)]
    if all_given(own):
        yield slice(0, len(span))
        return
    given = list(map(is_not, own, repeat(None)))
    for has_grad, stretch in groupby(range(len(span)), given.__getitem__):
        if has_grad:
            members = list(stretch)
            yield slice(members[0], members[-1] + 1)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory once, in any order of dimensions."""
    preserved = torch.empty_like(tensor, device="meta")  # keeps the strides of dense tensors only
    return tensor.is_contiguous() or tensor.stride() == preserved.stride()


def _holders(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


@cache
def _sole_holder() -> int:
    return _holders(torch.empty(1, device="cpu"))


@cache
def _has_dlpack(device_type: str) -> bool:
    try:
        probe = torch.zeros(2, device=device_type)
        piece = torch.from_dlpack(torch.utils.dlpack.to_dlpack(probe))
    except (RuntimeError, BufferError):
        return False
    return piece.data_ptr() == probe.data_ptr()


def why_not_packed(param: Tensor) -> str | None:
    """Why a parameter must stay where it lies; None if it may move into a slab.

    Moving is only right where nothing else knows the address: any alias (`state_dict()`, a tied
    weight, a flat buffer, a NumPy array) would silently keep the old memory.
    """
    if type(param) not in (Tensor, torch.nn.Parameter):
        return f"is a {type(param).__name__}"
    if param.numel() == 0:
        return "is empty"
    if not is_dense(param):
        return "is not dense"
    if not param.is_leaf:
        return "is not a leaf"
    if param.is_inference():
        return "is an inference tensor"
    if not _fills_storage(param):
        return "is a view of a larger storage"
    if param.numel() * param.itemsize > MAX_BYTES:
        return f"is larger than a slab ({MAX_BYTES >> 20} MiB)"
    if find(param) is not None:
        return None
    if param.device.type == "cpu" and (param.is_shared() or param.is_pinned()):
        return "lies in shared or pinned memory"
    if not param.untyped_storage().resizable():
        return "lies in memory of another owner"  # a NumPy array, a mapped file
    if _holders(param) > _sole_holder():
        return "shares its storage with another tensor"
    if not _has_dlpack(param.device.type):
        return f"lies on {param.device.type}, which has no DLPack"
    return None
