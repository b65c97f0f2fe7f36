"""What does the host do per step and parameter on the kernel path, without the launch?

    python -m perf.host

Without a GPU, triton's interpreter sends CPU tensors down the kernel path. The launch itself is
replaced by nothing: what remains is the gathering and comparing of addresses, the table's look-up,
the step counters and the version counters. With a backward before every step, the gradients are new
tensors at other addresses, and the processor's caches have held other things since the last step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import torch

from perf import run
from perf.implementations import IMPLEMENTATIONS, RULES, Workload
from perf.timing import synchronize

COUNTS = (1, 1000)


def host_time(name: str, count: int, device: torch.device, every: bool = False) -> float:
    """Microseconds of a step over `count` parameters of 64 elements.

    A backward comes before the first step, or before `every` one; the loss is kept, as in training.
    """
    from tritonopt.kernels.launch import Launch

    Launch.run = lambda *args, **kwargs: None  # type: ignore[method-assign]
    optimizer = Workload(name, [(64,)] * count, device).build(IMPLEMENTATIONS["tritonopt"])
    times = []
    for number in range(60 if every else 600):
        if every or number == 0:
            optimizer.zero_grad()
            params = optimizer.param_groups[0]["params"]
            loss = torch.stack([(p * p).sum() for p in params]).sum()
            loss.backward()
            synchronize(device)
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return median(times[len(times) // 5 :]) * 1e6


def records(name: str, device: torch.device) -> Iterator[dict[str, Any]]:
    one, many = (host_time(name, count, device) for count in COUNTS)
    yield {
        "optimizer": name,
        "us_of_1": one,
        "us_of_1000": many,
        "us_per_further_parameter": (many - one) / (COUNTS[1] - COUNTS[0]),
        "us_of_1000_after_backward": host_time(name, COUNTS[1], device, every=True),
    }


def plan(device: torch.device, quick: bool) -> list[run.Job]:
    env = {"TRITON_INTERPRET": "1"} if device.type == "cpu" else {}
    return [run.Job("host", name, partial(records, name, device), env=env) for name in RULES]


if __name__ == "__main__":
    sys.exit(run.command(plan, seconds=120))
