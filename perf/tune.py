"""Which block and how many threads are fastest, for each kernel and dtype? `python -m perf.tune`

Needs a GPU; with TRITON_INTERPRET=1 it runs, and its times mean nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from perf import run
from perf.implementations import IMPLEMENTATIONS, RULES, Missing, Step, Workload, reason
from perf.timing import interleaved
from perf.workloads import WORKLOADS
from tritonopt.device import INTERPRET

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
          "fp64": torch.float64}  # fmt: skip
TILINGS = [
    (block, threads)
    for block in (512, 1024, 2048, 4096)
    for threads in (64, 128, 256, 512)
    if 4 <= block // threads <= 32
]
LABEL = "1 x 64M"
SHAPES = WORKLOADS[LABEL]


def tiled(workload: Workload, block: int, threads: int) -> Step:
    """A step whose launches have another grid than the library's."""
    from tritonopt.kernels import launch

    def step() -> None:
        with patch.multiple(launch, BLOCK=block, THREADS=threads):
            optimizer.step()

    with patch.multiple(launch, BLOCK=block, THREADS=threads):
        optimizer = workload.build(IMPLEMENTATIONS["tritonopt"])
    step()
    return step


def records(
    dtype: str, workload: Workload, tilings: list[tuple[int, int]], seconds: float
) -> Iterator[dict[str, Any]]:
    if workload.device.type == "cpu" and not INTERPRET:
        raise Missing(f"no kernels run on {workload.device}")
    from tritonopt.kernels import launch

    steps, missing = {}, {}
    for tiling in tilings:
        try:
            steps[str(tiling)] = tiled(workload, *tiling)
        except Exception as error:  # out of registers or of memory
            missing[str(tiling)] = reason(error)
    times = interleaved(steps, workload.device, seconds)
    for tiling in tilings:
        name = str(tiling)
        found = {"missing": missing[name]} if name in missing else times[name].summary()
        yield {
            "optimizer": workload.configuration, "workload": LABEL, "dtype": dtype,
            "least_bytes": workload.least_bytes, "block": tiling[0], "threads": tiling[1],
            "is_ours": tiling == (launch.BLOCK, launch.THREADS), **found,
        }  # fmt: skip


def plan(device: torch.device, quick: bool) -> list[run.Job]:
    tilings = [(1024, 128), (2048, 256)] if quick else TILINGS
    return [
        run.Job(
            "tune",
            f"{configuration}, {dtype}",
            partial(records, dtype, Workload(configuration, SHAPES, device, kind), tilings, 0.5),
        )
        for dtype, kind in DTYPES.items()
        for configuration in RULES
    ]


if __name__ == "__main__":
    sys.exit(run.command(plan, seconds=400))
