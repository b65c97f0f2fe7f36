"""What does a step cost on this machine's CPU, beside torch's for-loop and foreach?

    python -m perf.step_time [--quick] [--out perf/results/cpu.json]

All implementations run in turns, in one process, so that what disturbs one disturbs all; the table
has medians, with the spread from the 10th to the 90th percentile.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import triton

import tritonopt

WORKLOADS = {
    "1 x 16M": [2**24],
    "1 x 1M": [2**20],
    "100 x 10k": [10_000] * 100,
    "1000 x 64": [64] * 1000,
    "10000 x 16": [16] * 10_000,
}
BYTES = {"RMSprop": 20, "Rprop": 28}  # per fp32 element: read p, g, state; write p, state


def steps(name: str, sizes: list[int]) -> dict[str, Callable[[], Any]]:
    """The step of every implementation, on parameters of its own."""

    def build(cls: Any, **kwargs: Any) -> Callable[[], Any]:
        params = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
        for param in params:
            param.grad = torch.randn_like(param)
        return cls(params, **kwargs).step

    stock, ours = getattr(torch.optim, name), getattr(tritonopt, name)
    return {
        "for-loop": build(stock, foreach=False),
        "foreach": build(stock, foreach=True),
        "tritonopt": build(ours),
    }


def interleaved(functions: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Microseconds of every call, taking turns until the time is up, 5 turns at least."""
    for function in functions.values():
        for _ in range(3):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 5:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - start) * 1e6)
    return times


def triad_bandwidth() -> float:
    """Bytes per second of an in-place a += b over memory: two reads and a write of each element."""
    a, b = torch.zeros(2**26), torch.ones(2**26)
    times = interleaved({"triad": lambda: a.add_(b)}, 1.0)["triad"]
    return 3 * a.nbytes / (median(times) * 1e-6)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under half a minute")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    bandwidth = triad_bandwidth()
    figures: list[dict[str, Any]] = []
    print(f"in-place triad: {bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
    heads = "".join(f"{head:>12}" for head in ("for-loop", "foreach", "tritonopt"))
    print(f"{'us':20}{heads}   (10-90 %)   ratio  floor")
    for workload, sizes in WORKLOADS.items():
        for name in BYTES:
            times = interleaved(steps(name, sizes), 2.0 if arguments.quick else 8.0)
            middle = {key: median(values) for key, values in times.items()}
            spread = quantiles(times["tritonopt"], n=10)
            ratio = min(middle["for-loop"], middle["foreach"]) / middle["tritonopt"]
            floor = sum(sizes) * BYTES[name] / bandwidth * 1e6 / middle["tritonopt"]
            cells = "".join(f"{value:12,.0f}" for value in middle.values())
            print(f"{name + ' ' + workload:20}{cells}   {spread[0]:,.0f}-{spread[-1]:,.0f}"
                  f"   {ratio:.1f}x  {floor:.0%}", flush=True)  # fmt: skip
            figures.append({
                "optimizer": name, "workload": workload, "median_us": middle, "p10_us": spread[0],
                "p90_us": spread[-1], "times_the_better_stock": ratio, "fraction_of_floor": floor,
            })  # fmt: skip
    if arguments.out:
        machine = {"device": platform.processor() or platform.machine(), "os": platform.system(),
                   "threads": torch.get_num_threads(), "torch": torch.__version__,
                   "triton": triton.__version__, "triad_bytes_per_s": bandwidth}  # fmt: skip
        arguments.out.write_text(json.dumps({"machine": machine, "steps": figures}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
