"""Slabs: contiguous memory handed out in pieces that each own a storage.

A slab is a layout, never the truth: parameters and state may be moved or replaced by anyone at any
time. The storage of a piece knows its slab, so the tensor itself is asked where it lies now; there
is no list of slabs that something else could change.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

ALIGNMENT = 128
"""Bytes from one possible start of a piece to the next: a GPU cache line."""

MAX_BYTES = 2**28
"""Packing holds a slab's tensors twice for a moment: this bounds what that costs."""


class Slab:
    """One contiguous allocation. It lives while any piece of it does."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        self.memory = torch.zeros(numel, dtype=dtype, device=device)
        self.pieces: dict[int, int] = {}  # bytes, by address

    def flat(self, address: int, numel: int) -> Tensor:
        """The `numel` elements that begin at `address`, one-dimensional."""
        first = (address - self.memory.data_ptr()) // self.memory.itemsize
        return self.memory[first : first + numel]


def find(tensor: Tensor) -> Slab | None:
    """The slab of the tensor's dtype and device of which it is a whole piece, if there is one.

    What follows a part of a piece is not padding but the rest of the piece: a part is none.
    """
    slab: Slab | None = getattr(tensor.untyped_storage(), "tritonopt_slab", None)
    if slab is None or slab.pieces.get(tensor.data_ptr()) != tensor.numel() * tensor.itemsize:
        return None
    same = slab.memory.dtype == tensor.dtype and slab.memory.device == tensor.device
    return slab if same and _fills_storage(tensor) else None


def _fills_storage(tensor: Tensor) -> bool:
    nbytes = tensor.numel() * tensor.itemsize
    return bool(tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == nbytes)


def pitch(numel: int, itemsize: int, alignment: int = ALIGNMENT) -> int:
    """Elements from the start of a piece of `numel` elements to the start of its neighbour."""
    lane = max(alignment // itemsize, 1)
    return -(-numel // lane) * lane


@torch.inference_mode(False)  # an inference tensor could not be updated outside of that mode
def allocate(
    like: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
    start: float = 0.0,
    alignment: int = ALIGNMENT,
) -> list[Tensor]:
    """Tensors of the shapes and strides of `like`, filled with `start`, side by side in one slab.

    Every piece has a storage of its own and of its own size, so that saving, resizing or sharing
    one concerns no other. It keeps the slab alive.
    """
    if len(like) < 2:  # nothing lies beside it
        kind: Any = {"dtype": dtype, "device": device, "requires_grad": False}
        return [torch.full_like(t, start, **kind) for t in like]
    pitches = [pitch(t.numel(), dtype.itemsize, alignment) for t in like]
    slab = Slab(sum(pitches), dtype, device)
    if start:
        slab.memory.fill_(start)
    pieces = []
    for tensor, offset in zip(like, accumulate(pitches, initial=0), strict=False):
        view = slab.memory.as_strided(tensor.size(), tensor.stride(), offset)
        piece = torch.from_dlpack(torch.utils.dlpack.to_dlpack(view))
        slab.pieces[piece.data_ptr()] = piece.numel() * piece.itemsize
        piece.untyped_storage().tritonopt_slab = slab  # type: ignore[attr-defined]
        pieces.append(piece)
    return pieces


def batches(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, in batches of one device and dtype, each of which fits a slab."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for members in kinds.values():
        batch: list[Tensor] = []
        total = 0
        for tensor in members:
            nbytes = pitch(tensor.numel(), tensor.itemsize) * tensor.itemsize
            if batch and total + nbytes > MAX_BYTES:
                yield batch
                batch, total = [], 0
            batch.append(tensor)
            total += nbytes
        yield batch


@torch.no_grad()
def pack(tensors: Iterable[Tensor], alignment: int = ALIGNMENT) -> None:
    """Moves the tensors that may be moved into slabs; they stay the objects that they are."""
    for batch in batches(t for t in tensors if find(t) is None and why_not_packed(t) is None):
        if len(batch) < 2:
            continue
        try:
            pieces = allocate(batch, batch[0].dtype, batch[0].device, alignment=alignment)
        except torch.OutOfMemoryError:
            return
        torch._foreach_copy_(pieces, batch)
        if batch[0].device.type != "cpu":  # keeps their memory until this stream has read it
            stream = torch.accelerator.current_stream(batch[0].device)
            for tensor in batch:
                tensor.detach().record_stream(stream)
        for tensor, piece in zip(batch, pieces, strict=True):
            tensor.data = piece


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory once, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    preserved = torch.empty_like(tensor, device="meta")  # keeps the strides of dense tensors only
    return tensor.stride() == preserved.stride()


@torch.inference_mode(False)
def _holders(tensor: Tensor) -> tuple[int, ...]:
    """How many hold the tensor (a DLPack capsule does), its storage, and the storage's object."""
    # Whether a leaf has an accumulator, which holds it, cannot be asked. This makes one if not.
    accumulator = get_gradient_edge(tensor) if tensor.requires_grad else None  # noqa: F841
    storage = tensor.untyped_storage()
    uses = torch._C._storage_Use_Count(storage._cdata)
    return tensor._use_count(), uses, sys.getrefcount(storage)  # type: ignore[attr-defined]


@cache
@torch.inference_mode(False)
def _sole_holders(requires_grad: bool) -> tuple[int, ...]:
    return _holders(torch.empty(1, device="cpu", requires_grad=requires_grad))


@cache
def _has_dlpack(device_type: str) -> bool:
    try:
        probe = torch.zeros(2, device=device_type)
        piece = torch.from_dlpack(torch.utils.dlpack.to_dlpack(probe))
    except (RuntimeError, BufferError):
        return False
    return piece.data_ptr() == probe.data_ptr()


def why_not_packed(tensor: Tensor) -> str | None:
    """Why a tensor must stay where it lies; None if it may move into a slab, or lies in one.

    An alias (a `state_dict()`, a tied weight, a flat buffer, a NumPy array) would silently keep the
    old memory: only what nothing else knows the place of is moved.
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"is a {type(tensor).__name__}"
    if tensor.numel() == 0:
        return "is empty"
    if not is_dense(tensor):
        return "is not dense"
    if not tensor.is_leaf:
        return "is not a leaf"
    if tensor.is_inference():
        return "is an inference tensor"
    if tensor.numel() * tensor.itemsize > MAX_BYTES:
        return f"is larger than a slab ({MAX_BYTES >> 20} MiB)"
    if find(tensor) is not None:
        return None
    if not _has_dlpack(tensor.device.type):
        return f"lies on {tensor.device.type}, which has no DLPack"
    if tensor.device.type == "cpu" and (tensor.is_shared() or tensor.is_pinned()):
        return "lies in shared or pinned memory"
    if not _fills_storage(tensor):
        return "is a view of a larger storage"
    if not tensor.untyped_storage().resizable():
        return "lies in memory of another owner"  # a NumPy array, a mapped file
    holders, sole = _holders(tensor), _sole_holders(tensor.requires_grad)
    if holders[1:] != sole[1:]:
        return "shares its storage with another tensor"
    if holders != sole:
        return "is held by DDP, or by an importer of DLPack"  # these two look alike
    return None
