"""What does a step cost, and how near to the floor is it? `python -m perf.cpu --only steps`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from perf.implementations import CONFIGURATIONS, Missing, Workload, start
from perf.run import Jobs
from perf.timing import Times, bandwidth, interleaved
from perf.workloads import Shape

Record = dict[str, Any]
TOLD: list[Record] = []  # by `pytest perf`, at its end
TEMPORARY = 3  # tensors of the parameters' size that a step of torch's needs while it runs


class Measured(NamedTuple):
    times: dict[str, Times]  # of the implementations, in turns
    missing: dict[str, str]  # why others are
    bandwidth: float  # bytes per second, before and after: it changes from minute to minute


def measure(
    workload: Workload, names: Sequence[str], up_to: dict[str, int], seconds: float
) -> Measured:
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # not silently eager
    needed = _needed(workload, len(names))
    if needed > free_memory(workload.device):
        raise Missing(f"needs {needed / 2**30:.0f} GiB of free memory")
    workload = workload.with_gradients()
    steps, missing = start(workload, names, up_to)
    before = bandwidth(workload.device, seconds / 6)
    times = interleaved(steps, workload.device, seconds)
    after = bandwidth(workload.device, seconds / 6)
    return Measured(times, missing, (before + after) / 2)


def _needed(workload: Workload, count: int) -> int:
    """Bytes of gradients, and of parameters and state of `count` optimizers, which a step reads
    and writes."""
    grads = workload.elements * workload.dtype.itemsize
    return grads + count * (workload.least_bytes - grads) // 2 + TEMPORARY * grads


def free_memory(device: torch.device) -> int:
    if device.type != "cpu":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    available = re.search(r"MemAvailable:\s*(\d+) kB", info.read_text()) if info.exists() else None
    if available:  # what files are cached in, included
        return int(available[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def records(
    label: str,
    workload: Workload,
    names: Sequence[str],
    up_to: dict[str, int],
    seconds: float,
) -> Iterator[Record]:
    common = {
        "optimizer": workload.configuration, "workload": label, "tensors": len(workload.shapes),
    }  # fmt: skip
    measured = measure(workload, names, up_to, seconds)
    for name in names:
        record = {**common, "implementation": name}
        if name in measured.missing:
            yield {**record, "missing": measured.missing[name]}
        else:
            yield {**record, **figures(workload, measured, name)}


def figures(workload: Workload, measured: Measured, name: str) -> Record:
    """The times, and the floor: the least bytes at the bandwidth that was measured with them."""
    least_bytes = workload.least_bytes
    floor = least_bytes / measured.bandwidth * 1e6
    summary = measured.times[name].summary()
    taken = summary["device_us"] or summary["wall_us"]
    return {
        "elements": workload.elements, "least_bytes": least_bytes,
        "bandwidth_bytes_per_s": measured.bandwidth, "floor_us": floor,
        "fraction_of_floor": floor / taken["median"], **summary,
    }  # fmt: skip


def jobs(
    workloads: dict[str, list[Shape]],
    names: Sequence[str],
    device: torch.device,
    configurations: Sequence[str] = ("RMSprop", "Rprop"),
    **kwargs: Any,
) -> Jobs:
    """One per workload and optimizer."""
    return {
        f"{configuration}, {label}": partial(
            records, label, Workload(configuration, shapes, device), names, **kwargs
        )
        for label, shapes in workloads.items()
        for configuration in CONFIGURATIONS
        if configuration in configurations
    }
