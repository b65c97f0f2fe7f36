"""How long until the first compiled step, and how many graphs? `python -m perf.compile_time`

50 steps, with another `lr` at each, over parameters of 64 elements; in a fresh process for every
figure, with Inductor's and triton's caches off.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from perf import run
from perf.child import TimeIsUp, apart
from perf.implementations import IMPLEMENTATIONS, Missing, Workload
from perf.timing import synchronize

# As torch's documentation advises: a stock step is compiled anew for each float `lr`.
TENSOR_LR = IMPLEMENTATIONS["compiled"]._replace(options={"lr": torch.tensor(0.01)})
ENTRANCES = {
    "compile()": IMPLEMENTATIONS["compile()"],
    "compiled": TENSOR_LR,
    "backend": IMPLEMENTATIONS["backend"],
}
COUNTS = (50, 200, 1000)
STEPS = 50


def compile_time(entrance: str, workload: Workload) -> Iterator[dict[str, Any]]:
    """In a process that has compiled nothing yet."""
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
    yield {"first_step_s": first, "all_steps_s": total, "graphs": graphs}


def records(entrance: str, workload: Workload, seconds: float) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        env = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_CACHE_DIR": folder,
               "TRITON_CACHE_DIR": folder}  # fmt: skip
        try:
            (found,) = apart(partial(compile_time, entrance, workload), env, seconds)
        except TimeIsUp:
            found = {"missing": f"not compiled after {seconds:.0f} s"}
        except Missing as why:
            found = {"missing": str(why)}
    yield {"implementation": entrance, "optimizer": workload.configuration,
           "tensors": len(workload.shapes), **found}  # fmt: skip


def jobs(
    device: torch.device,
    quick: bool,
    counts: tuple[int, ...] = COUNTS,
    seconds: float = 200,
) -> run.Jobs:
    return {
        f"{configuration}, {entrance}, {count}": partial(
            records, entrance, Workload(configuration, [(64,)] * count, device), seconds
        )
        for count in ((20,) if quick else counts)
        for entrance in ENTRANCES
        for configuration in (("RMSprop",) if quick else ("RMSprop", "Rprop"))
    }


if __name__ == "__main__":
    sys.exit(run.script("compile", jobs))
