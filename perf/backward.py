"""How much memory do gradients take, and what does a training step cost, if steps are taken in
backward? `python -m perf.backward`, or with `cuda`

The peak is what a forward pass, a backward pass and a step add to parameters and state: gradients,
and activations, which are few here. Times are medians.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

import tritonopt
from perf.implementations import RULES
from perf.memory import cpu_memory, device_memory
from perf.tables import figure, grid
from perf.timing import synchronize

LAYERS, WIDTH = 32, 1024  # 32 gradients of 4 MiB
BUCKETS = {"after backward": None, "100 MiB": 100, "25 MiB": 25, "8 MiB": 8, "0": 0}


def training(rule: str, bucket: int | None, device: torch.device) -> Callable[[], None]:
    layers = [nn.Linear(WIDTH, WIDTH, bias=False, device=device) for _ in range(LAYERS)]
    for layer in layers:  # none of which makes its input larger or smaller
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
    model = nn.Sequential(*layers)
    optimizer = getattr(tritonopt, rule)(model.parameters(), lr=1e-6)
    x = torch.randn(8, WIDTH, device=device)
    if bucket is not None:
        tritonopt.step_in_backward(model, optimizer, bucket * 2**20)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured(rule: str, bucket: int | None, device: torch.device) -> list[str]:
    step, times = training(rule, bucket, device), []
    for _ in range(12):
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - start)
    _, peak = (cpu_memory if device.type == "cpu" else device_memory)(step)
    return [figure(peak / 2**20), figure(median(times[2:]) * 1e3)]


if __name__ == "__main__":
    device = torch.device(*sys.argv[1:] or ["cpu"])
    rows = [[r, b, *measured(r, size, device)] for r in RULES for b, size in BUCKETS.items()]
    print(grid(["", "steps are taken", "peak, MiB", "ms per step"], rows, text=2))
