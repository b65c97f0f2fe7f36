"""DTensors: what lies on this rank takes part in the same update as any other tensor."""

import sys
from typing import Any

import torch


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


def same_shards(left: Any, right: Any) -> bool:
    """Whether equal elements lie on the same rank: of two DTensors or of two plain tensors."""
    if not is_sharded(left) or not is_sharded(right):
        return is_sharded(left) == is_sharded(right)
    same = left.device_mesh == right.device_mesh and left.placements == right.placements
    return same and not any(placement.is_partial() for placement in left.placements)
