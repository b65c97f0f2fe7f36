"""Slabs: contiguous memory handed out in pieces that each own a storage.

A slab is a layout, never the truth: parameters and state may be moved or replaced by anyone at any
time. The storage of a piece knows its slab, so that a tensor is asked where it lies now.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

T = TypeVar("T")

MAX_BYTES = 2**28  # of a slab: packing holds its tensors twice for a moment
HAVE_DLPACK = ("cpu", "cuda", "xpu")  # devices whose memory can be handed out in pieces
LINE = 128
"""Bytes. Pieces as long begin at a multiple of it, a GPU's cache line and twice a CPU's, so that
no load is split; shorter ones follow each other without a gap."""


def find(tensor: Tensor) -> Tensor | None:
    """The slab of the tensor's dtype and device of which it is a whole piece, if there is one."""
    slab: Tensor | None = getattr(tensor.untyped_storage(), "tritonopt_slab", None)
    if slab is None or slab.dtype != tensor.dtype or slab.device != tensor.device:
        return None
    inside = 0 <= tensor.data_ptr() - slab.data_ptr() < slab.nbytes  # a storage may be moved
    return slab if inside and _fills_storage(tensor) else None


def _fills_storage(tensor: Tensor) -> bool:
    return bool(tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == tensor.nbytes)


def are_neighbours(left: Tensor, right: Tensor) -> bool:
    """Whether one ends where the other begins, in the same slab."""
    if left.data_ptr() + left.nbytes != right.data_ptr():
        return False
    slab = find(left)
    return slab is not None and slab is find(right)


def flattened(tensor: Tensor, numel: int | None = None) -> Tensor:
    """A dense tensor in the order of its memory; `numel`: with what follows it in its slab."""
    slab = None if numel is None else find(tensor)
    if numel is None or slab is None:
        return tensor.as_strided((tensor.numel(),), (1,))
    start = (tensor.data_ptr() - slab.data_ptr()) // slab.itemsize
    return slab.as_strided((numel,), (1,), start)


@torch.inference_mode(False)  # an inference tensor could not be updated outside of that mode
def allocate(
    like: Sequence[Tensor], dtype: torch.dtype, device: torch.device, start: float = 0.0
) -> list[Tensor]:
    """Tensors of the shapes and strides of `like`, filled with `start`, side by side in one slab.

    Every piece has a storage of its own and of its own size, so that saving, resizing or sharing
    one concerns no other. It keeps the slab alive.
    """
    if len(like) < 2 or device.type not in HAVE_DLPACK:  # nothing lies beside it
        return [torch.full_like(t, start, dtype=dtype, device=device) for t in like]
    offsets, end, line = [], 0, LINE // dtype.itemsize
    for tensor in like:
        numel = tensor.numel()
        offsets.append(-(-end // line) * line if numel >= line else end)
        end = offsets[-1] + numel
    slab = torch.zeros(end, dtype=dtype, device=device)
    if start:
        slab.fill_(start)
    pieces = []
    for tensor, offset in zip(like, offsets, strict=True):
        view = slab.as_strided(tensor.size(), tensor.stride(), offset)
        piece = torch.from_dlpack(torch.utils.dlpack.to_dlpack(view))
        piece.untyped_storage().tritonopt_slab = slab  # type: ignore[attr-defined]
        pieces.append(piece)
    return pieces


def batches(tensors: Iterable[Tensor], kind: Callable[[Tensor], object]) -> list[list[Tensor]]:
    """The tensors in order, in batches of one kind, each of which fits a slab."""
    kinds: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(kind(tensor), []).append(tensor)
    sized = (filled(some, lambda t: t.numel() * t.itemsize, MAX_BYTES) for some in kinds.values())
    return list(chain.from_iterable(sized))


def filled(
    items: Iterable[T], size: Callable[[T], int], limit: int,
    joins: Callable[[T], bool] = lambda item: True,
) -> list[list[T]]:  # fmt: skip
    """The items in order, in batches whose sizes sum up to `limit` at most, or of one item.

    `joins`: whether an item may be in the batch of the one before it.
    """
    found: list[list[T]] = []
    room = -1
    for item in items:
        if size(item) > room or not joins(item):
            found.append([])
            room = limit
        found[-1].append(item)
        room -= size(item)
    return found


@torch.no_grad()
def pack(tensors: Iterable[Tensor]) -> None:
    """Moves the tensors that may be moved into slabs; they stay the objects that they are."""
    movable = (t for t in dict.fromkeys(tensors) if find(t) is None and why_not_packed(t) is None)
    for batch in batches(movable, lambda t: (t.device, t.dtype)):
        if len(batch) < 2:
            continue
        try:
            pieces = allocate(batch, batch[0].dtype, batch[0].device)
        except torch.OutOfMemoryError:
            return
        torch._foreach_copy_(pieces, batch)
        for tensor, piece in zip(batch, pieces, strict=True):
            if not tensor.is_cpu:  # keeps its memory until this stream has read it
                tensor.detach().record_stream(torch.accelerator.current_stream(tensor.device))
            tensor.data = piece


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory once, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    preserved = torch.empty_like(tensor, device="meta")  # keeps the strides of dense tensors only
    return tensor.stride() == preserved.stride()


def _holders(tensor: Tensor) -> tuple[int, ...]:
    """How many hold the tensor (a DLPack capsule does), its storage, and the storage's object."""
    # Whether a leaf has an accumulator, which holds it, cannot be asked. This makes one if not.
    accumulator = get_gradient_edge(tensor) if tensor.requires_grad else None  # noqa: F841
    storage = tensor.untyped_storage()
    uses = torch._C._storage_Use_Count(storage._cdata)
    return tensor._use_count(), uses, sys.getrefcount(storage)  # type: ignore[attr-defined]


@cache
def _sole_holders(requires_grad: bool) -> tuple[int, ...]:
    return _holders(torch.empty(1, device="cpu", requires_grad=requires_grad))


@torch.inference_mode(False)
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
    if tensor.nbytes > MAX_BYTES:
        return f"is larger than a slab ({MAX_BYTES >> 20} MiB)"
    if find(tensor) is not None:
        return None
    if tensor.device.type not in HAVE_DLPACK:
        return f"lies on {tensor.device.type}, which has no DLPack"
    if tensor.is_cpu and (tensor.is_shared() or tensor.is_pinned()):
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
