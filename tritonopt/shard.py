"""DTensors: what lies on this rank takes part in the same update as any other tensor."""

import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor. Its module, which takes a second to import, is not imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """A DTensor's part on this rank, possibly empty; anything else as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def coordinates(tensor: Any) -> tuple[int, ...]:
    """Which shard a DTensor has on this rank; nothing for any other tensor, or on other ranks."""
    if not is_sharded(tensor):
        return ()
    at = tensor.device_mesh.get_coordinate() or ()
    return tuple(x for x, kind in zip(at, tensor.placements, strict=False) if kind.is_shard())


def means(counts: Sequence[Tensor], tensors: Sequence[Any]) -> list[Tensor]:
    """Of what each rank has counted in its parts of tensors: the sums, by numbers of elements."""
    sums, meshes = [*counts], defaultdict(list)
    for index, tensor in enumerate(tensors):
        if is_sharded(tensor):
            kinds = tuple(kind.is_shard() for kind in tensor.placements)
            meshes[tensor.device_mesh, kinds].append(index)
    for (mesh, kinds), some in meshes.items():  # in the same order on all ranks
        from torch.distributed.tensor import DTensor, Partial, Replicate

        mine = torch.stack([counts[index] for index in some])
        placements = [Partial() if kind else Replicate() for kind in kinds]
        both = DTensor.from_local(mine, mesh, placements, run_check=False).full_tensor()
        for index, value in zip(some, both.unbind(), strict=True):
            sums[index] = value
    return [value / max(tensor.numel(), 1) for value, tensor in zip(sums, tensors, strict=True)]


def same_shards(left: Any, right: Any) -> bool:
    """Whether equal elements lie on the same rank: of two DTensors or of two plain tensors."""
    if not is_sharded(left) or not is_sharded(right):
        return is_sharded(left) == is_sharded(right)
    same = left.device_mesh == right.device_mesh and left.placements == right.placements
    return same and not any(placement.is_partial() for placement in left.placements)
