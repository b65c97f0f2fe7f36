"""How long until the first compiled step, and how many graphs? `python -m perf.compile_time`

50 steps, with another `lr` at each, over parameters of 64 elements; in a fresh process for every
figure, with Inductor's and triton's caches off.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from perf import run
from perf.implementations import IMPLEMENTATIONS, TRACED, Workload
from perf.timing import synchronize

# As torch's documentation advises: a stock step is compiled anew for each float `lr`.
TENSOR_LR = IMPLEMENTATIONS["compiled"]._replace(options={"lr": torch.tensor(0.01)})
ENTRANCES = {
    "compile()": IMPLEMENTATIONS["compile()"],
    "compiled": TENSOR_LR,
    "backend": IMPLEMENTATIONS["backend"],
    "torch.compile(step)": TRACED,
}
COUNTS = (50, 200, 1000)
STEPS = 50


def compile_time(entrance: str, configuration: str, count: int, device: str) -> dict[str, Any]:
    """In a process that has compiled nothing yet."""
    workload = Workload(configuration, [(64,)] * count, torch.device(device))
    implementation = ENTRANCES[entrance]
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


def records(
    entrance: str, configuration: str, count: int, device: torch.device, seconds: float
) -> Iterator[dict[str, Any]]:
    record = {"implementation": entrance, "optimizer": configuration, "tensors": count}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        env = {
            **os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder,
        }  # fmt: skip
        arguments = (entrance, configuration, str(count), device.type)
        try:
            found = run.child("perf.compile_time", *arguments, env=env, seconds=seconds)
        except subprocess.TimeoutExpired:
            found = {"missing": f"not compiled after {seconds:.0f} s"}
        except RuntimeError as why:
            found = {"missing": str(why)}
    yield {**record, **found}


def jobs(
    device: torch.device,
    quick: bool,
    counts: tuple[int, ...] = COUNTS,
    seconds: float = 200,
) -> run.Jobs:
    return {
        f"{configuration}, {entrance}, {count}": partial(
            records, entrance, configuration, count, device, seconds
        )
        for count in ((20,) if quick else counts)
        for entrance in ENTRANCES
        for configuration in (("RMSprop",) if quick else ("RMSprop", "Rprop"))
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        entrance, configuration, count, device = sys.argv[2:]
        print(json.dumps(compile_time(entrance, configuration, int(count), device)))
    else:
        sys.exit(run.script("compile", jobs))
