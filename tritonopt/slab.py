"""Slabs: contiguous memory handed out in pieces that each own a storage.

A slab is a layout, never the truth. Parameters and state tensors may be moved or replaced by
anyone at any time; whoever uses a slab asks `find` where a tensor lies *now*.
"""

from __future__ import annotations

import bisect
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate, count
from math import inf

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

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
        self.pieces: dict[int, int] = {}  # bytes, by address
        entry = self.start, next(_number), weakref.ref(self, _forget)
        with _lock:
            bisect.insort(_slabs, entry)

    def flat(self, address: int, numel: int) -> Tensor:
        """The `numel` elements that begin at `address`, one-dimensional."""
        first = (address - self.start) // self.memory.itemsize
        return self.memory[first : first + numel]


_lock = threading.RLock()  # reentrant: a collection inside the critical section may call _forget
_slabs: list[tuple[int, int, weakref.ref[Slab]]] = []  # by where they start
_number = count()


def _forget(reference: weakref.ref[Slab]) -> None:
    with _lock:
        _slabs[:] = [e for e in tuple(_slabs) if e[2] is not reference and e[2]() is not None]


def find(tensor: Tensor) -> Slab | None:
    """The slab of the tensor's dtype and device of which it is a piece, if there is one.

    A part of a piece is none: what follows it is not padding but the rest of the piece.
    """
    address = tensor.data_ptr()
    with _lock:
        position = bisect.bisect(_slabs, (address, inf)) - 1
        slab = _slabs[position][2]() if position >= 0 else None
    if slab is None or not slab.start <= address < slab.end:
        return None
    same = slab.memory.dtype == tensor.dtype and slab.memory.device == tensor.device
    is_piece = slab.pieces.get(address) == tensor.numel() * tensor.itemsize
    return slab if same and is_piece and _fills_storage(tensor) else None


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
        slab.pieces[piece.data_ptr()] = piece.numel() * piece.itemsize
        pieces.append(torch.from_dlpack(torch.utils.dlpack.to_dlpack(piece)))
    return pieces, slab


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory once, in any order of dimensions."""
    preserved = torch.empty_like(tensor, device="meta")  # keeps the strides of dense tensors only
    return tensor.is_contiguous() or tensor.stride() == preserved.stride()


@torch.inference_mode(False)
def _holders(tensor: Tensor) -> tuple[int, ...]:
    """How many hold the tensor (a DLPack capsule does), its storage, and the storage's object."""
    # Of a leaf's accumulator it is not known whether there is one. Now there is.
    accumulator = get_gradient_edge(tensor) if tensor.requires_grad else None  # noqa: F841
    storage = tensor.untyped_storage()
    uses = torch._C._storage_Use_Count(storage._cdata)
    return tensor._use_count(), uses, sys.getrefcount(storage)  # type: ignore[attr-defined]


@cache
@torch.inference_mode(False)
def _sole_holders(requires_grad: bool) -> tuple[int, ...]:
    return _holders(torch.empty(1, device="cpu", requires_grad=requires_grad))


def why_not_moved(tensor: Tensor) -> str | None:
    """Why memory must stay where it lies; None if nothing else knows where that is.

    Any alias (`state_dict()`, a tied weight, a flat buffer, a NumPy array) would silently keep the
    old memory.
    """
    if tensor.device.type == "cpu" and (tensor.is_shared() or tensor.is_pinned()):
        return "lies in shared or pinned memory"
    if not _fills_storage(tensor):
        return "is a view of a larger storage"
    if find(tensor) is None and not tensor.untyped_storage().resizable():
        return "lies in memory of another owner"  # a NumPy array, a mapped file
    holders, sole = _holders(tensor), _sole_holders(tensor.requires_grad)
    if holders[1:] != sole[1:]:
        return "shares its storage with another tensor"
    if holders != sole:
        return "is held by DDP, or by an importer of DLPack"  # which know it alike
    return None


@cache
def _has_dlpack(device_type: str) -> bool:
    try:
        probe = torch.zeros(2, device=device_type)
        piece = torch.from_dlpack(torch.utils.dlpack.to_dlpack(probe))
    except (RuntimeError, BufferError):
        return False
    return piece.data_ptr() == probe.data_ptr()


def why_not_packed(param: Tensor) -> str | None:
    """Why a parameter must stay where it lies; None if it may move into a slab, or lies there."""
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
    if param.numel() * param.itemsize > MAX_BYTES:
        return f"is larger than a slab ({MAX_BYTES >> 20} MiB)"
    if find(param) is not None:
        return None
    if not _has_dlpack(param.device.type):
        return f"lies on {param.device.type}, which has no DLPack"
    return why_not_moved(param)
