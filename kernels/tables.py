"""Tables of addresses on a device, uploaded where an address has changed."""

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonopt.device import is_capturing

RECENT_TABLES = 8
"""The caching allocator repeats itself with a short period. 48 bytes per tensor each."""

SPARE_TABLES = 2
"""Made outside of graph captures, during which no memory can be pinned."""

Columns = Sequence[Sequence[Tensor] | None]
"""What a kernel writes: the parameters, and each kind of state, or None where it is not used."""

_CAPTURED: list[tuple[Tensor, ...]] = []  # what captured graphs read; never written again


class Tables:
    """One for each set of addresses that gradients have lately had.

    A row is a tensor: numel, the addresses of its gradient and, in every one of `columns`, its own.
    """

    def __init__(
        self, numels: Sequence[int], columns: Columns, device: torch.device, block: int
    ) -> None:
        self.device = device
        self.programs = _programs(numels, block, device)
        none = [0] * len(numels)
        found = [none if column is None else [t.data_ptr() for t in column] for column in columns]
        rows = torch.tensor([numels, none, *found], dtype=torch.int64, device="cpu").t()
        self._rows = rows.contiguous()
        self._recent: list[tuple[Any, ...]] = []  # stream, addresses, buffers; the latest one first
        self._spare: list[tuple[Tensor, Tensor]] = []

    def find(self, grads: Sequence[Tensor | None]) -> Tensor:
        """The table of these gradients, on the device; 0 stands for one that is missing."""
        try:
            at = array("q", map(Tensor.data_ptr, grads))  # type: ignore[arg-type]
        except TypeError:  # of None
            at = array("q", [0 if grad is None else grad.data_ptr() for grad in grads])
        if is_capturing(self.device):
            return self._during_capture(at)
        while len(self._spare) < SPARE_TABLES:
            self._spare.append(self._buffers())
        on_cpu = self.device.type == "cpu"
        stream = None if on_cpu else torch.accelerator.current_stream(self.device)
        recent = self._recent  # another thread may replace it: optimizers share a norm's tables
        row = next((row for row in recent if row[:2] == (stream, at)), None)
        if row is None:
            buffers = self._buffers()
            if stream is not None:  # it may have been made while another one was current
                self.programs.record_stream(stream)
            row = stream, at, *self._fill(*buffers, at)
        if not recent or row is not recent[0]:
            others = [other for other in recent if other is not row]
            self._recent = [row, *others[: RECENT_TABLES - 1]]
        return row[-1]

    def _during_capture(self, at: "array[int]") -> Tensor:
        if not self._spare:
            raise RuntimeError(
                "a graph capture needs a step outside of it first, and can hold two steps "
                "after each such step: the tables of addresses are pinned there"
            )
        host, table = self._fill(*self._spare.pop(), at)
        _CAPTURED.append((host, table, self.programs))
        return table

    def _buffers(self) -> tuple[Tensor, Tensor]:
        """Host memory and its copy on the device, filled once: a copy may be under way."""
        on_cpu = self.device.type == "cpu"
        host = torch.empty_like(self._rows, pin_memory=not on_cpu)
        return host, host if on_cpu else torch.empty_like(host, device=self.device)

    def _fill(self, host: Tensor, table: Tensor, at: "array[int]") -> tuple[Tensor, Tensor]:
        host.copy_(self._rows)
        host[:, 1] = torch.frombuffer(at, dtype=torch.int64)
        return host, table.copy_(host, non_blocking=True)


def _programs(numels: Sequence[int], size: int, device: torch.device) -> Tensor:
    """For every program of the grid: index of its tensor << 32 | index of its block."""
    blocks = (torch.tensor(numels, dtype=torch.int64, device="cpu") + size - 1) // size
    tensor = torch.repeat_interleave(blocks)
    first = (torch.cumsum(blocks, 0) - blocks)[tensor]
    return (tensor << 32 | torch.arange(len(tensor), device="cpu") - first).to(device)
