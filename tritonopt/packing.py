"""Moves parameters into slabs and makes their state there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from math import copysign
from typing import Any

import torch
from torch import Tensor

from tritonopt import slab
from tritonopt.eligible import is_plain, same_layout, why_not_native
from tritonopt.shard import is_sharded

NEVER = -0.0
"""The count of steps in state that no step has used: 0 to everyone who does not ask for the sign.

torch makes state at the first step, when it knows what parameters and options are then. State that
is there before must be told from a state that somebody gives, after copies and checkpoints, too.
"""


def is_unused(entry: Mapping[str, Any]) -> bool:
    """Whether state was made here, or in the optimizer that it was copied from, and not used."""
    step = entry.get("step")
    if not isinstance(step, Tensor) or step.numel() != 1 or step.is_meta:
        return False
    count = float(step)
    return count == 0 and copysign(1, count) < 0


@torch.no_grad()
def pack(params: Iterable[Tensor]) -> bool:
    """Moves the parameters that may be moved into slabs; whether there were any."""
    movable = [
        p
        for p in params
        if why_not_native(p) is None and slab.why_not_packed(p) is None and slab.find(p) is None
    ]
    packed = False
    for batch in by_slab(movable):
        try:
            pieces, _ = slab.allocate(batch, batch[0].dtype, batch[0].device)
        except torch.OutOfMemoryError:
            break
        torch._foreach_copy_(pieces, list(batch))
        _await_copies(batch)
        for param, piece in zip(batch, pieces, strict=True):
            param.data = piece
        packed = True
    return packed


def make_state(
    state: MutableMapping[Tensor, Any],
    params: Sequence[Tensor],
    starts: Mapping[str, float],
    on_device: bool,
) -> None:
    """State of each parameter's shape that begins with `starts`, and a count of steps."""
    scalar = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    for param in filter(_is_special, params):
        home = param.device if on_device else torch.device("cpu")
        state[param] = {"step": torch.full((), NEVER, dtype=scalar, device=home)}
        for key, start in starts.items():  # of its parameter's type: sharded checkpoints need that
            state[param][key] = torch.full_like(param, start)
    for batch in by_slab([p for p in params if not _is_special(p)]):
        device, dtype = batch[0].device, batch[0].dtype
        home = device if on_device else torch.device("cpu")
        steps, memory = slab.allocate([_SCALAR] * len(batch), scalar, home, alignment=1)
        memory.memory.fill_(NEVER)
        columns = {"step": steps}
        for key, start in starts.items():
            columns[key], memory = slab.allocate(batch, dtype, device)
            memory.memory.fill_(start)
        for number, param in enumerate(batch):
            state[param] = {key: column[number] for key, column in columns.items()}


def _is_special(param: Tensor) -> bool:
    """Whether what is made like it is no plain tensor."""
    makes_plain = type(param).__torch_function__ is torch._C._disabled_torch_function_impl
    return is_sharded(param) or not (type(param) is Tensor or makes_plain)


@torch.no_grad()
def pack_state(state: Mapping[Tensor, Any], params: Sequence[Tensor], keys: Sequence[str]) -> bool:
    """Moves state that does not lie in a slab; whether there was any.

    The tensors stay the ones that they are: others may hold them.
    """
    packed = False
    for key in keys:
        many = Counter(id(state[p][key]) for p in params)
        moved = [
            p for p in params
            if many[id(state[p][key])] == 1
            and _lies_outside(state[p][key], p, key)
            and slab.why_not_moved(state[p][key]) is None
        ]  # fmt: skip
        for batch in by_slab(moved, {p: state[p][key] for p in moved}):
            old = [state[p][key] for p in batch]
            like, alignment = (old, 1) if key == "step" else (batch, slab.ALIGNMENT)
            new, _ = slab.allocate(like, old[0].dtype, old[0].device, alignment)
            torch._foreach_copy_(new, old)
            _await_copies(old)
            packed = True
            for tensor, piece in zip(old, new, strict=True):
                tensor.data = piece
    return packed


def _await_copies(tensors: Sequence[Tensor]) -> None:
    """Keeps their memory, which may be another stream's, until the current stream has read it."""
    device = tensors[0].device
    if device.type != "cpu":
        stream = torch.accelerator.current_stream(device)
        for tensor in tensors:
            tensor.detach().record_stream(stream)


_SCALAR = torch.empty((), device="meta")


def by_slab(
    params: Iterable[Tensor], states: dict[Tensor, Tensor] | None = None
) -> Iterator[Sequence[Tensor]]:
    """Parameters in batches of which each, or its state, fits a slab of one device and dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in params:
        tensor = states[param] if states else param
        kinds.setdefault((tensor.device, tensor.dtype), []).append(param)
    for (_, dtype), members in kinds.items():
        yield from slab.batches(members, dtype)


def any_outside(
    movable: Iterable[Tensor],
    state: Mapping[Tensor, Any],
    params: Sequence[Tensor],
    keys: Sequence[str],
) -> bool:
    """Whether a movable parameter, or state of a parameter, lies in no slab: at a first look."""
    if any(p.numel() and slab.find(p) is None for p in movable):
        return True
    return any(_lies_outside(state[p][key], p, key) for p in params for key in keys)


def _lies_outside(tensor: Tensor, param: Tensor, key: str) -> bool:
    """Whether a state tensor does not lie in a slab in its parameter's layout."""
    if not isinstance(tensor, Tensor) or not is_plain(tensor) or tensor.numel() == 0:
        return False
    if slab.find(tensor) is not None and (key == "step" or same_layout(tensor, param)):
        return False
    return key == "step" or (tensor.device == param.device and tensor.size() == param.size())
