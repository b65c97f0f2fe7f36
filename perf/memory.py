"""What memory do an optimizer and its step take, beside torch's? `python -m perf.memory`

State is the tensors in `state`; kept is what else stays allocated after two steps, without
parameters and gradients; the peak is what a third step adds to that while it runs.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from perf import run
from perf.implementations import COMPILED, RULES, Implementation, Step, Workload, beside_plain
from perf.implementations import IMPLEMENTATIONS as ALL
from perf.workloads import WORKLOADS

NAMES = ("for-loop", "foreach", "tritonopt", "compile()")
CHOSEN = ("1000 x 64", "ResNet-50", "1 x 64M")


def cpu_memory(function: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that a call leaves allocated, and the most it had allocated: the allocator's record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = [e for e in events if e["name"] == "[memory]" and e["args"]["Device Type"] == 0]
    now = peak = 0
    for event in sorted(changes, key=lambda event: event["args"]["Ev Idx"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    del kept
    return now, peak


def device_memory(function: Callable[[], Any]) -> tuple[int, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = function()
    torch.cuda.synchronize()
    after, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    del kept
    return after - before, peak - before


def memory(workload: Workload, implementation: Implementation) -> dict[str, int]:
    """Bytes."""
    allocated = cpu_memory if workload.device.type == "cpu" else device_memory

    def begin() -> tuple[Any, Step]:
        optimizer = workload.build(implementation)
        step = implementation.start(optimizer)
        step(), step()
        gc.collect()
        return optimizer, step

    begin()  # what a process allocates once belongs to no optimizer
    gc.collect()  # an optimizer in a cycle is not freed while the next one is looked at
    held, _ = allocated(begin)
    gc.collect()
    optimizer, step = begin()
    _, peak = allocated(step)
    tensors = [t for entry in optimizer.state.values() for t in entry.values()]
    state = sum(t.nbytes for t in tensors if t.device.type == workload.device.type)
    given = 2 * workload.elements * workload.dtype.itemsize
    return {"state_bytes": state, "kept_bytes": held - given - state, "peak_bytes": peak}


def records(
    label: str, chosen: Sequence[tuple[Workload, Sequence[str]]]
) -> Iterator[dict[str, Any]]:
    for workload, name in [(workload, name) for workload, names in chosen for name in names]:
        yield {
            "optimizer": workload.configuration, "workload": label, "implementation": name,
            "elements": workload.elements, **memory(workload, ALL[name]),
        }  # fmt: skip


def plan(device: torch.device, quick: bool) -> list[run.Job]:
    return [
        run.Job(
            "memory",
            label,
            partial(records, label,
                    [(Workload(rule, WORKLOADS[label], device), NAMES) for rule in RULES]),
            seconds=120,
        )
        for label in (CHOSEN[:1] if quick else CHOSEN)
    ]  # fmt: skip


def options(device: torch.device, quick: bool) -> list[run.Job]:
    label = CHOSEN[0] if quick else "1 x 8M"
    return [
        run.Job(
            "options_memory", f"{work.configuration}, {label}",
            partial(records, label, [(work, [name for name in names if name in COMPILED])]),
            seconds=120,
        )
        for work, names in beside_plain(WORKLOADS[label], device)
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(run.command(lambda *given: plan(*given) + options(*given), seconds=300))
