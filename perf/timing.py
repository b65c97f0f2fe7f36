"""Microseconds of functions that take turns, and the bandwidth of a device's memory."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

CYCLES_PER_US = 2000  # at most, on the GPUs of today: a spin of so many lasts 1 us or longer


@dataclass
class Times:
    """Microseconds of every call."""

    wall: list[float] = field(default_factory=list)  # until the device is done
    host: list[float] = field(default_factory=list)  # until the call returns
    device: list[float] = field(default_factory=list)  # of the kernels, without the host's gaps

    def summary(self) -> dict[str, Any]:
        return {f"{name}_us": _summary(getattr(self, name)) for name in ("wall", "host", "device")}


def _summary(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    tenths = quantiles(values, n=10, method="inclusive")
    return {"median": median(values), "p10": tenths[0], "p90": tenths[-1]}


def interleaved(
    functions: dict[str, Callable[[], Any]], device: torch.device, seconds: float, rounds: int = 5
) -> dict[str, Times]:
    """Calls the functions in turns until the time is up, in `rounds` turns at least.

    What disturbs one disturbs all, and each finds the caches as another leaves them: the order is
    random, and the times of the device alone are taken in turns of their own.
    """
    for function in functions.values():
        for _ in range(2):
            function()
    times = {name: Times() for name in functions}
    order, chance = list(functions), random.Random(0)
    end = time.perf_counter() + seconds
    while functions and (time.perf_counter() < end or len(times[order[0]].wall) < rounds):
        for name in order:
            _measure(functions[name], device, times[name])
        if device.type == "cuda":
            for name in order:
                synchronize(device)
                times[name].device.append(_device_time(functions[name], times[name].host[-1]))
        last = order[-1:]
        chance.shuffle(order)
        if order[:1] == last:  # none runs twice in a row
            order.append(order.pop(0))
    return times


def _measure(function: Callable[[], Any], device: torch.device, times: Times) -> None:
    synchronize(device)
    start = time.perf_counter()
    function()
    times.host.append((time.perf_counter() - start) * 1e6)
    synchronize(device)
    times.wall.append((time.perf_counter() - start) * 1e6)


def _device_time(function: Callable[[], Any], host_us: float) -> float:
    """The device spins while the host queues the kernels, so that they follow one another."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(min(2 * host_us, 50_000) * CYCLES_PER_US))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@cache
def _arrays(device: torch.device) -> Tensor:
    """Random, as some GPUs compress what they move."""
    return torch.randn(2, 2**20, device=device).repeat(1, 64 if device.type == "cpu" else 256)


def bandwidth(device: torch.device, seconds: float = 0.3) -> float:
    """Bytes per second of a device copy; on a CPU of an in-place triad, `a += 2 * b`.

    Over arrays that no cache holds: of 256 MiB each, on an accelerator of 1 GiB.
    """
    a, b = _arrays(device)
    if device.type == "cpu":
        streams, function = 3, lambda: a.add_(b, alpha=2)
    else:
        streams, function = 2, lambda: a.copy_(b)
    times = interleaved({"": function}, device, seconds)[""]
    return streams * a.nbytes / median(times.device or times.wall) * 1e6
