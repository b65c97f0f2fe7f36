"""Tables of addresses on a device, uploaded where an address has changed."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonopt.device import is_capturing

RECENT_TABLES = 8
"""The caching allocator repeats itself with a short period. 48 bytes per tensor each."""

_captured: list[tuple[Tensor, ...]] = []  # what captured graphs read; never written again


class Tables:
    """One for each set of addresses that gradients have lately had.

    A row is a tensor: numel, the addresses `before`, its gradient's, and the addresses `after`.
    """

    def __init__(
        self,
        numels: Sequence[int],
        before: Sequence[Sequence[int]],
        after: Sequence[Sequence[int]],
        device: torch.device,
        block: int,
    ) -> None:
        self.device = device
        self.programs = _programs(numels, block, device)
        columns = [numels, *before, [0] * len(numels), *after]
        self._rows = torch.tensor(columns, dtype=torch.int64, device="cpu").t().contiguous()
        self._grad = 1 + len(before)
        self._recent: OrderedDict[Any, tuple[Tensor, Tensor]] = OrderedDict()
        self._last: Any = None  # looked for: to compare costs a tenth of hashing
        self._spare: list[tuple[Tensor, Tensor]] = []

    def find(self, grads: tuple[int, ...]) -> Tensor:
        """The table of gradients at these addresses."""
        capturing = is_capturing(self.device)
        key = _stream(self.device), grads
        if not capturing:
            last = self._last  # another thread may replace it, as optimizers share a norm's tables
            if last is not None and last[0] == key:
                return last[1]
            found = self._recent.pop(key, None)
            if found is not None:
                self._recent[key] = found  # the most recent one
                self._last = key, found[1]
                return found[1]
        if capturing:
            if not self._spare:
                raise RuntimeError(
                    "a graph capture needs a step outside of it first, and can hold two steps "
                    "after each such step: the tables of addresses are pinned there"
                )
            host, table = self._spare.pop()
            _captured.append((host, table, self.programs))
        else:
            host, table = _buffers(self._rows.shape, self.device)
            if self.device.type != "cpu":  # it may have been made while another stream was current
                self.programs.record_stream(torch.accelerator.current_stream(self.device))
        host.copy_(self._rows)
        host[:, self._grad] = torch.frombuffer(array("q", grads), dtype=torch.int64)
        if table is not host:
            table.copy_(host, non_blocking=True)
        if not capturing:  # only now: an interrupt may have come before
            self._recent[key] = (host, table)
            self._last = key, table
            if len(self._recent) > RECENT_TABLES:
                self._recent.popitem(last=False)
        return table

    def reserve(self, count: int = 2) -> None:
        """Memory for tables that a graph capture may ask for: none can be pinned during one."""
        while len(self._spare) < count:
            self._spare.append(_buffers(self._rows.shape, self.device))


def _programs(numels: Sequence[int], size: int, device: torch.device) -> Tensor:
    """For every program of the grid: index of its tensor << 32 | index of its block."""
    blocks = (torch.tensor(numels, device="cpu") + size - 1) // size
    first = torch.cumsum(blocks, 0) - blocks
    tensor = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), blocks)
    block = torch.arange(len(tensor), device="cpu") - first[tensor]
    return (tensor << 32 | block).to(device)


def _buffers(shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Host memory and its copy on the device. Neither is written again: a copy may be under way."""
    if device.type == "cpu":
        host = torch.empty(shape, dtype=torch.int64, device="cpu")
        return host, host
    host = torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=True)
    return host, torch.empty(shape, dtype=torch.int64, device=device)


def _stream(device: torch.device) -> int:
    return 0 if device.type == "cpu" else torch.accelerator.current_stream(device).stream_id
