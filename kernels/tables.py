"""Tables of addresses on a device, uploaded where an address has changed."""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonopt.device import is_capturing

RECENT_TABLES = 8
"""The caching allocator repeats itself with a short period. 48 bytes per tensor each."""

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
        self._recent: OrderedDict[Any, tuple[Tensor, Tensor]] = OrderedDict()
        self._last: Any = None  # looked for: to compare costs a tenth of hashing
        self._spare: list[tuple[Tensor, Tensor]] = []

    def find(self, grads: tuple[int, ...]) -> Tensor:
        """The table of gradients at these addresses."""
        if is_capturing(self.device):
            return self._during_capture(grads)
        key = _stream(self.device), grads
        last = self._last  # another thread may replace it, as optimizers share a norm's tables
        if last is not None and last[0] == key:
            return last[1]
        both = self._recent.pop(key, None)
        if both is None:
            both = _buffers(self._rows.shape, self.device)
            if self.device.type != "cpu":  # it may have been made while another stream was current
                self.programs.record_stream(torch.accelerator.current_stream(self.device))
            self._fill(both, grads)
        self._recent[key] = both  # the most recent one, and only now: an interrupt may have come
        self._last = key, both[1]
        if len(self._recent) > RECENT_TABLES:
            self._recent.popitem(last=False)
        return both[1]

    def _during_capture(self, grads: tuple[int, ...]) -> Tensor:
        if not self._spare:
            raise RuntimeError(
                "a graph capture needs a step outside of it first, and can hold two steps "
                "after each such step: the tables of addresses are pinned there"
            )
        both = self._spare.pop()
        _CAPTURED.append((*both, self.programs))
        return self._fill(both, grads)

    def _fill(self, both: tuple[Tensor, Tensor], grads: tuple[int, ...]) -> Tensor:
        host, table = both
        host.copy_(self._rows)
        host[:, 1] = torch.frombuffer(array("q", grads), dtype=torch.int64)
        if table is not host:
            table.copy_(host, non_blocking=True)
        return table

    def reserve(self, count: int = 2) -> None:
        """Memory for tables that a graph capture may ask for: none can be pinned during one."""
        while len(self._spare) < count:
            self._spare.append(_buffers(self._rows.shape, self.device))


def _programs(numels: Sequence[int], size: int, device: torch.device) -> Tensor:
    """For every program of the grid: index of its tensor << 32 | index of its block."""
    blocks = (torch.tensor(numels, dtype=torch.int64, device="cpu") + size - 1) // size
    first = torch.cumsum(blocks, 0) - blocks
    tensor = torch.repeat_interleave(blocks)
    block = torch.arange(len(tensor), device="cpu") - first[tensor]
    return (tensor << 32 | block).to(device)


def _buffers(shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Host memory and its copy on the device. Neither is written again: a copy may be under way."""
    on_cpu = device.type == "cpu"
    host = torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=not on_cpu)
    return host, host if on_cpu else torch.empty_like(host, device=device)


def _stream(device: torch.device) -> int:
    return 0 if device.type == "cpu" else torch.accelerator.current_stream(device).stream_id
