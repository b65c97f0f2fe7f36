"""What do options cost beside the plain optimizer? `python -m perf.options --out perf/results`

On a machine that does other things as well, set OMP_NUM_THREADS=1: threads that wait for each other
would measure what keeps one of them waiting.
"""

from __future__ import annotations

import sys

import torch

from perf import memory, run, steps


def plan(device: torch.device, quick: bool) -> list[run.Job]:
    return [*steps.options(device, quick), *memory.options(device, quick)]


if __name__ == "__main__":
    sys.exit(run.command(plan, seconds=400, stem="options"))
