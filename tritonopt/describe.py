"""The table that `describe()` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch.nn.parameter import is_lazy

from tritonopt import slab
from tritonopt.bucket import Bucket
from tritonopt.device import path
from tritonopt.layout import Layout

HEAD = (
    "group", "device", "dtype", "path", "packed", "in place", "torch", "elements", "bytes/step"
)  # fmt: skip
TEXT = ("device", "dtype", "path")


def table(layouts: Sequence[Layout]) -> str:
    rows: list[tuple[str, ...]] = [HEAD]
    notes: list[str] = []
    for index, layout in enumerate(layouts):
        rows += [(str(index), *row) for row in (*_native(layout), *_fallback(layout))]
        notes += [f"group {index}: {note}" for note in _notes(layout)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if name in TEXT else cell.rjust(width)
            for name, cell, width in zip(HEAD, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines + notes)


def _native(layout: Layout) -> Iterator[tuple[str, ...]]:
    for bucket in layout.buckets:
        packed = sum(slab.find(p) is not None for p in bucket.params)
        in_place = len(bucket.params) - packed
        numel = sum(p.numel() for p in bucket.params)
        nbytes = numel * bucket.bytes_per_element
        yield (
            str(bucket.device), _name(bucket.dtype), _path(bucket),
            str(packed), str(in_place), "0", f"{numel:,}", f"{nbytes:,}",
        )  # fmt: skip


def _fallback(layout: Layout) -> Iterator[tuple[str, ...]]:
    counts: Counter[tuple[str, str]] = Counter()
    numels: Counter[tuple[str, str]] = Counter()
    for param, _ in layout.fallback:
        kind = str(param.device), _name(param.dtype)
        counts[kind] += 1
        numels[kind] += 0 if is_lazy(param) else param.numel()
    for kind, count in counts.items():
        yield (*kind, "torch", "0", "0", str(count), f"{numels[kind]:,}", "-")


def _notes(layout: Layout) -> Iterator[str]:
    loose = [
        owner
        for bucket in layout.buckets
        for owner, param in zip(bucket.owners, bucket.params, strict=True)
        if slab.find(param) is None
    ]
    reasons = Counter(slab.why_not_packed(p) or "was moved out of its slab" for p in loose)
    for why, count in reasons.items():
        yield f"{count} in place: {why}"
    for why, count in Counter(why for _, why in layout.fallback).items():
        yield f"{count} left to torch: {why}"
    counted = sum(len(bucket.params) for bucket in layout.buckets) + len(layout.fallback)
    if counted < len(layout.params):
        yield f"{len(layout.params) - counted} without state until their first gradient"


def _path(bucket: Bucket) -> str:
    return getattr(bucket.update, "path", path(bucket.device)[1])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
