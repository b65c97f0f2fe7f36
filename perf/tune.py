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
from perf.implementations import IMPLEMENTATIONS, Missing, Step, Workload, reason
from perf.timing import interleaved
from perf.workloads import WORKLOADS, Shape
from tritonopt.device import INTERPRET

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
          "fp64": torch.float64}  # fmt: skip
TILINGS = [
    (block, threads)
    for block in (512, 1024, 2048, 4096)
    for threads in (64, 128, 256, 512)
    if 4 <= block // threads <= 32
]
CHOSEN = ("1 x 64M", "ResNet-50")


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
    label: str, dtype: str, workload: Workload, tilings: list[tuple[int, int]], seconds: float
) -> Iterator[dict[str, Any]]:
    if workload.device.type == "cpu" and not INTERPRET:
        raise Missing(f"no kernels run on {workload.device}")
    common = {"optimizer": workload.configuration, "workload": label, "dtype": dtype,
              "least_bytes": workload.least_bytes}  # fmt: skip
    from tritonopt.kernels import launch

    ours = (launch.BLOCK, launch.THREADS)
    steps = {}
    for tiling in tilings:
        try:
            steps[str(tiling)] = tiled(workload, *tiling)
        except Exception as error:  # out of registers or of memory
            yield {**common, "block": tiling[0], "threads": tiling[1], "missing": reason(error)}
    times = interleaved(steps, workload.device, seconds)
    for block, threads in tilings:
        if str((block, threads)) in times:
            summary = times[str((block, threads))].summary()
            is_ours = (block, threads) == ours
            yield {**common, "block": block, "threads": threads, "is_ours": is_ours, **summary}


def jobs(
    device: torch.device,
    quick: bool,
    workloads: dict[str, list[Shape]] = WORKLOADS,
    seconds: float = 0.5,
) -> run.Jobs:
    tilings = [(1024, 128), (2048, 256)] if quick else TILINGS
    return {
        f"{configuration}, {dtype}, {label}": partial(
            records, label, dtype, Workload(configuration, workloads[label], device, kind),
            tilings, seconds,
        )
        for dtype, kind in DTYPES.items()
        for configuration in ("RMSprop", "Rprop")
        for label in CHOSEN
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(run.script("tune", jobs))
