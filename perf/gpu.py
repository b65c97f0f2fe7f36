"""Everything that a GPU can tell, in under 8 minutes: `python -m perf.gpu --out perf/results`

What matters most is measured first; what takes long to compile comes last. It reads the limits of
the GPU's clocks and changes none of its settings.
"""

from __future__ import annotations

import sys

import torch

from perf import compile_time, host, memory, run, steps, tune
from perf.machine import accelerator

CHOSEN = ("1 x 64M", "1 x 256M", "1000 x 64", "ResNet-50", "GPT-2 124M")
POWERS = (26, 22, 18, 14, 10)
FIRST = 4  # grids of both rules in fp32 and bf16; python -m perf.tune has all dtypes


def plan(device: torch.device, quick: bool) -> list[run.Job]:
    chosen = steps.QUICK if quick else CHOSEN
    first, later, last = steps.stages(device, chosen, seconds=0.5)
    more = () if quick else ("RMSprop, centered, momentum",)
    return [
        *first,
        *later,
        *host.plan(device, quick),
        *memory.plan(device, quick),
        *steps.jobs(device, ["1 x 64M"] * len(more), steps.EAGER, more, seconds=0.5),
        *steps.curve(device, POWERS[-2:] if quick else POWERS, seconds=0.2),
        *tune.plan(device, quick)[:FIRST],
        *steps.options(device, quick),
        *memory.options(device, quick),
        *compile_time.plan(device, quick),
        *last,
    ]


if __name__ == "__main__":
    if accelerator() is None and "--device" not in sys.argv:
        print("perf.gpu needs a GPU that this torch can use; python -m perf.cpu measures the CPU")
        sys.exit(2)
    sys.exit(run.command(plan, seconds=460))
