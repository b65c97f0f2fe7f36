"""What does a step cost, and how near to the floor is it? `python -m perf.steps`

All implementations of a workload take turns in one process. The floor is the time in which memory
can move what a step must move, at the bandwidth that is measured with it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from perf import run
from perf.implementations import IMPLEMENTATIONS, RULES, Workload, beside_plain, start
from perf.timing import Times, bandwidth, interleaved
from perf.workloads import WORKLOADS

CHOSEN = ("1000 x 64", "1 x 64M", "ResNet-50", "LSTM", "DQN", "MobileNetV3-Large", "1 x 8M")
QUICK = ("1000 x 64", "DQN")
EAGER = ["for-loop", "foreach", "tritonopt", "foreach, replayed", "tritonopt, replayed"]
OURS = ["for-loop", "foreach", "tritonopt", "compile()"]
ALL = ["for-loop", "foreach", "compiled", "tritonopt", "compile()", "backend"]
MANY = 20  # parameters: to compile the stock optimizer over more takes minutes


class Measured(NamedTuple):
    times: dict[str, Times]  # of the implementations, in turns
    missing: dict[str, str]  # why others are
    bandwidth: float  # bytes per second, before and after: it changes from minute to minute


def measure(workload: Workload, names: Iterable[str], seconds: float) -> Measured:
    gc.collect()  # of the workload before, whose memory this one may need
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # not silently eager
    steps, missing = start(workload.with_gradients(), names)
    before = bandwidth(workload.device, seconds / 6)
    times = interleaved(steps, workload.device, seconds)
    after = bandwidth(workload.device, seconds / 6)
    return Measured(times, missing, (before + after) / 2)


def figures(workload: Workload, measured: Measured, name: str) -> dict[str, Any]:
    if name in measured.missing:
        return {"missing": measured.missing[name]}
    summary = measured.times[name].summary()
    taken = summary["device_us"] or summary["wall_us"]
    state, moved = workload.bytes_of(IMPLEMENTATIONS[name])
    floor = workload.elements * moved / measured.bandwidth * 1e6
    return {
        "elements": workload.elements, "least_bytes": workload.elements * moved,
        "state_bytes_per_element": state,
        "bandwidth_bytes_per_s": measured.bandwidth, "floor_us": floor,
        "fraction_of_floor": floor / taken["median"], **summary,
    }  # fmt: skip


def records(
    workloads: Sequence[tuple[str, Workload]], names: Sequence[str], seconds: float
) -> Iterator[dict[str, Any]]:
    for label, workload in workloads:
        measured = measure(workload, names, seconds)
        for name in names:
            yield {
                "optimizer": workload.configuration, "workload": label,
                "tensors": len(workload.shapes), "implementation": name,
                **figures(workload, measured, name),
            }  # fmt: skip


def jobs(
    device: torch.device,
    chosen: Iterable[str],
    names: Sequence[str],
    rules: Sequence[str] = RULES,
    seconds: float = 1.0,
) -> list[run.Job]:
    """One per workload and rule; on a GPU, where a process starts slowly, one per workload."""
    gpu = device.type == "cuda"
    names = [name for name in names if gpu or not IMPLEMENTATIONS[name].needs_gpu]
    stock = any(IMPLEMENTATIONS[name].compiles_stock for name in names)
    return [
        run.Job(
            "steps",
            f"{' and '.join(some)}, {label}{', compiled' if stock else ''}",
            partial(records, [(label, Workload(rule, WORKLOADS[label], device)) for rule in some],
                    names, seconds),
            seconds=300 if stock else 60,
            compiles=len(WORKLOADS[label]) if stock else 0,
        )
        for label in chosen
        for some in ([rules] if gpu else [(rule,) for rule in rules])
    ]  # fmt: skip


def stages(
    device: torch.device, chosen: Sequence[str], seconds: float = 1.0
) -> tuple[list[run.Job], list[run.Job], list[run.Job]]:
    """Jobs without a compiler, those with one, and those that take minutes to compile: each
    measures the peers again, beside what is new."""
    few = [label for label in chosen if len(WORKLOADS[label]) < MANY]
    many = sorted({*chosen} - {*few}, key=lambda label: len(WORKLOADS[label]))
    gpu = device.type == "cuda"  # where compile() changes nothing
    names = [name for name in ALL if name != "compile()" or not gpu]
    ours = [] if gpu else jobs(device, many, OURS, seconds=seconds)
    return (
        jobs(device, chosen, EAGER, seconds=seconds),
        ours + jobs(device, few, names, seconds=seconds),
        jobs(device, many, names, seconds=seconds),
    )


def curve(device: torch.device, powers: Iterable[int], seconds: float) -> list[run.Job]:
    """Of one parameter: its size decides, not the heap, and one process measures all sizes."""
    names = EAGER[:3] if device.type == "cuda" else OURS
    sizes = [2**power for power in powers]
    return [
        run.Job(
            "curve",
            rule,
            partial(records, [(f"1 x {n}", Workload(rule, [(n,)], device)) for n in sizes],
                    names, seconds),
            seconds=120,
        )
        for rule in RULES
    ]  # fmt: skip


def options(device: torch.device, quick: bool) -> list[run.Job]:
    """The time and the bytes of options, beside the plain optimizer."""
    big = "1 x 64M" if device.type == "cuda" else "1 x 8M"
    chosen = QUICK[:1] if quick else (big, "1000 x 64")
    return [
        run.Job(
            "options", f"{work.configuration}, {label}",
            partial(records, [(label, work)], names, 3.0), seconds=150,
        )
        for label in chosen
        for work, names in beside_plain(WORKLOADS[label], device)
    ]  # fmt: skip


def plan(device: torch.device, quick: bool) -> list[run.Job]:
    first, later, last = stages(device, QUICK if quick else CHOSEN)
    return first + later + options(device, quick) + last


if __name__ == "__main__":
    sys.exit(run.command(plan, seconds=600))
