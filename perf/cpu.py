"""Everything that the README says of a CPU: `python -m perf.cpu --out perf/results`

What matters most is measured first. What is compiled comes later, measured beside its peers again,
and last what takes minutes to compile.
"""

from __future__ import annotations

import sys

import torch

from perf import compile_time, host, memory, run, steps

POWERS = (10, 14, 18, 22, 26)


def plan(device: torch.device, quick: bool) -> list[run.Job]:
    first, later, last = steps.stages(device, steps.QUICK if quick else steps.CHOSEN)
    return [
        *first,
        *host.plan(device, quick),
        *memory.plan(device, quick),
        *later,
        *steps.curve(device, POWERS[:2] if quick else POWERS, seconds=0.3),
        *compile_time.plan(device, quick),
        *last,
    ]


if __name__ == "__main__":
    sys.exit(run.command(plan, seconds=720, stem="cpu"))
