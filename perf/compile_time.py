"""How long until the first compiled step, and how many graphs? `python -m perf.compile_time`

50 steps, with another `lr` at each, over parameters of 64 elements; in a fresh process for every
figure, with Inductor's and triton's caches off.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

from perf import run
from perf.implementations import IMPLEMENTATIONS, RULES, Workload
from perf.timing import synchronize

CHOSEN = {"compile()": (50, 1000), "backend": (50,), "compiled": (50,)}  # parameters
STEPS = 50


def compile_time(name: str, workload: Workload) -> dict[str, Any]:
    """In a process that has compiled nothing yet."""
    implementation = IMPLEMENTATIONS[name]
    if name == "compiled":  # as torch advises: it is compiled anew for each `lr` that is a float
        implementation = implementation._replace(options={"lr": torch.tensor(0.01)})
    optimizer = workload.build(implementation)
    step = implementation.start(optimizer)
    begin = time.perf_counter()
    step()
    synchronize(workload.device)
    first = time.perf_counter() - begin
    for _ in range(STEPS - 1):
        for group in optimizer.param_groups:
            group["lr"] *= 0.99
        step()
    synchronize(workload.device)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    total = time.perf_counter() - begin
    return {"first_step_s": first, "all_steps_s": total, "graphs": graphs}


def records(name: str, workload: Workload) -> Iterator[dict[str, Any]]:
    with fresh_cache():
        yield {
            "implementation": name, "optimizer": workload.configuration,
            "tensors": len(workload.shapes), **compile_time(name, workload),
        }  # fmt: skip


def plan(device: torch.device, quick: bool) -> list[run.Job]:
    chosen = {name: counts[:1] for name, counts in CHOSEN.items()} if quick else CHOSEN
    return [
        run.Job(
            "compile",
            f"{configuration}, {name}, {count}",
            partial(records, name, Workload(configuration, [(64,)] * count, device)),
            seconds=75,
            env={"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
            compiles=count if IMPLEMENTATIONS[name].compiles_stock else 0,
        )
        for name, counts in chosen.items()
        for count in counts
        for configuration in RULES
    ]


if __name__ == "__main__":
    sys.exit(run.command(plan, seconds=500))
