"""The table that `describe()` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from tritonopt import slab
from tritonopt.device import path
from tritonopt.group import Group
from tritonopt.shard import local

HEAD = (
    "group", "device", "dtype", "path", "packed", "in place", "torch", "elements", "bytes/step"
)  # fmt: skip
TEXT = ("device", "dtype", "path")


def table(groups: Sequence[Group], sweep_path: str, packed: bool) -> str:
    rows: list[tuple[str, ...]] = [HEAD]
    notes: list[str] = []
    for index, known in enumerate(groups):
        found = *_native(known, sweep_path, packed), *_fallback(known)
        rows += [(str(index), *row) for row in found]
        notes += [f"group {index}: {note}" for note in _notes(known, packed)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if name in TEXT else cell.rjust(width)
            for name, cell, width in zip(HEAD, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines + notes)


def _native(known: Group, sweep_path: str, packed: bool) -> Iterator[tuple[str, ...]]:
    """A row for each launch or sweep; what has no state yet will be in one with its like."""
    rows: dict[tuple[str, str, str], list[tuple[Tensor, int]]] = {}
    for part in known.plan.parts if known.plan is not None else ():
        kind = str(part.device), _name(part.dtype), _path(part.device, sweep_path)
        params = [known.native[index] for index in part.indices]
        rows.setdefault(kind, []).extend((p, part.bytes_per_element) for p in params)
    for param, why in known.expected():
        if why is not None:
            continue
        device = local(param).device
        kind = str(device), _name(param.dtype), _path(device, sweep_path)
        nbytes = param.itemsize * (3 + 2 * len(known.rule.used))
        rows.setdefault(kind, []).append((param, nbytes))
    for kind, members in rows.items():
        in_slabs = sum(_why_in_place(p, packed) is None for p, _ in members)
        numel = sum(local(p).numel() for p, _ in members)
        nbytes = sum(local(p).numel() * per_element for p, per_element in members)
        counts = in_slabs, len(members) - in_slabs, 0, numel, nbytes
        yield (*kind, *(f"{count:,}" for count in counts))


def _why_in_place(param: Tensor, packed: bool) -> str | None:
    """None for what lies in a slab, and for what the first step will move to one."""
    why = slab.why_not_packed(param)
    if why is None and packed and slab.find(param) is None:
        return "nothing lies beside it, or it was moved after the first step"
    return why


def _path(device: torch.device, sweep_path: str) -> str:
    kind, name = path(device)
    return sweep_path if kind == "eager" else name


def _fallback(known: Group) -> Iterator[tuple[str, ...]]:
    counts: Counter[tuple[str, str]] = Counter()
    numels: Counter[tuple[str, str]] = Counter()
    for param, _ in _left_to_torch(known):
        kind = str(param.device), _name(param.dtype)
        counts[kind] += 1
        numels[kind] += 0 if is_lazy(param) else param.numel()
    for kind, count in counts.items():
        yield (*kind, "torch", "0", "0", str(count), f"{numels[kind]:,}", "-")


def _left_to_torch(known: Group) -> list[tuple[Tensor, str]]:
    return [*known.fallback, *((p, why) for p, why in known.expected() if why is not None)]


def _notes(known: Group, packed: bool) -> Iterator[str]:
    expected = known.expected()
    in_place = [*known.native, *(param for param, why in expected if why is None)]
    reasons = [_why_in_place(param, packed) for param in in_place]
    for why, count in Counter(filter(None, reasons)).items():
        yield f"{count} in place: {why}"
    for why, count in Counter(why for _, why in _left_to_torch(known)).items():
        yield f"{count} left to torch: {why}"
    waiting = len(known.waiting) - (0 if known.native else len(expected))
    if waiting:
        yield f"{waiting} without state until their first gradient"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
