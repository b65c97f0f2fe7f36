"""Tables of addresses on a device, uploaded where an address has changed."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tritonopt.device import is_capturing

RECENT_TABLES = 8
"""The caching allocator repeats itself with a short period. 48 bytes per tensor each."""

_captured: list[tuple[Tensor, ...]] = []  # what captured graphs read; never written again


class Tables:
    """One for each set of addresses that gradients have lately had."""

    def __init__(
        self, numels: Sequence[int], columns: int, device: torch.device, block: int
    ) -> None:
        self.numels = numels
        self.device = device
        self.programs = _programs(numels, block, device)
        self.size = len(numels) * (columns + 1)
        self._recent: OrderedDict[Any, tuple[Tensor, Tensor]] = OrderedDict()
        self._last: Any = None  # looked for: to compare costs a tenth of hashing
        self._spare: list[tuple[Tensor, Tensor]] = []

    def find(self, grads: tuple[int, ...], before: Any = (), after: Any = ()) -> Tensor:
        """A table of which each row is numel and addresses; only those of gradients may change."""
        capturing = is_capturing(self.device)
        key = _stream(self.device), grads
        if not capturing:
            if self._last is not None and self._last[0] == key:
                return self._last[1]
            if key in self._recent:
                self._recent.move_to_end(key)
                self._last = key, self._recent[key][1]
                return self._recent[key][1]
        columns = zip(self.numels, *before, grads, *after, strict=True)
        rows = array("q", chain.from_iterable(columns))
        if capturing:
            if not self._spare:
                raise RuntimeError(
                    "a graph capture needs a step outside of it first, and can hold two steps "
                    "after each such step: the tables of addresses are pinned there"
                )
            host, table = self._spare.pop()
            _captured.append((host, table, self.programs))
        else:
            host, table = _buffers(len(rows), self.device)
            if self.device.type != "cpu":  # it may have been made while another stream was current
                self.programs.record_stream(torch.accelerator.current_stream(self.device))
            self._recent[key] = (host, table)
            self._last = key, table
            if len(self._recent) > RECENT_TABLES:
                self._recent.popitem(last=False)
        host.copy_(torch.frombuffer(rows, dtype=torch.int64))
        return table if table is host else table.copy_(host, non_blocking=True)

    def reserve(self, count: int = 2) -> None:
        """Memory for tables that a graph capture may ask for: none can be pinned during one."""
        while len(self._spare) < count:
            self._spare.append(_buffers(self.size, self.device))


def _programs(numels: Sequence[int], size: int, device: torch.device) -> Tensor:
    """For every program of the grid: index of its tensor << 32 | index of its block."""
    blocks = (torch.tensor(numels, device="cpu") + size - 1) // size
    first = torch.cumsum(blocks, 0) - blocks
    tensor = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), blocks)
    block = torch.arange(len(tensor), device="cpu") - first[tensor]
    return (tensor << 32 | block).to(device)


def _buffers(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Host memory and its copy on the device. Neither is written again: a copy may be under way."""
    if device.type == "cpu":
        host = torch.empty(size, dtype=torch.int64, device="cpu")
        return host, host
    host = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=True)
    return host, torch.empty(size, dtype=torch.int64, device=device)


def _stream(device: torch.device) -> int:
    return 0 if device.type == "cpu" else torch.accelerator.current_stream(device).stream_id
