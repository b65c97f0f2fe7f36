"""Does training in bf16 learn? `python -m perf.bf16`

A small network learns the outputs of another one, from the same start, in fp32, in plain bf16, and
in bf16 with each option. Rounded to nearest, an update of less than half a unit in the last place
of its parameter is lost. Losses are those of all data, in fp32 with the parameters as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

import tritonopt
from perf import run

STEPS, EVERY, SEEDS = 1500, 50, 5
OPTIONS = {"lr": 3e-5}
BF16 = torch.bfloat16
WAYS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "bf16": (BF16, {}),
    "bf16, state_dtype=torch.float32": (BF16, {"state_dtype": torch.float32}),
    "bf16, stochastic_rounding=True": (BF16, {"stochastic_rounding": True}),
    'bf16, master="split"': (BF16, {"master": "split"}),
}


def network() -> nn.Module:
    layers = nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    return nn.Sequential(*layers)


def train(way: str, seed: int, steps: int = STEPS) -> tuple[list[float], float]:
    """Losses at every so many steps and at the end, and the share of elements of parameters that
    one of the last steps leaves as they were."""
    torch.manual_seed(seed)
    dtype, options = WAYS[way]
    x, teacher, single = torch.randn(512, 32), network(), network()
    target = teacher(x).detach() * 3
    model = network().bfloat16().to(dtype)
    optimizer = tritonopt.RMSprop(model.parameters(), **OPTIONS, **options)
    losses, kept = [], []

    def loss(some: slice | torch.Tensor) -> torch.Tensor:
        params = {name: param.float() for name, param in model.named_parameters()}
        return (functional_call(single, params, x[some]) - target[some]).square().mean()

    for step in range(steps):
        if step % EVERY == 0:
            losses.append(loss(slice(None)).item())
        loss(torch.randint(512, (64,))).backward()
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        optimizer.step()
        optimizer.zero_grad()
        if step >= steps - EVERY:
            after = nn.utils.parameters_to_vector(model.parameters())
            kept.append((before == after).float().mean().item())
    return [*losses, loss(slice(None)).item()], mean(kept)


def records(steps: int, seeds: int) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)  # small as it is, it would only wait for the others
    for way in WAYS:
        runs = [train(way, seed, steps) for seed in range(seeds)]
        losses = [losses for losses, _ in runs]
        yield {"option": way, "every": EVERY, "losses": losses, "kept": [kept for _, kept in runs]}


def plan(device: torch.device, quick: bool) -> list[run.Job]:
    steps, seeds = (200, 2) if quick else (STEPS, SEEDS)
    return [run.Job("bf16", "RMSprop", partial(records, steps, seeds), seconds=240)]


if __name__ == "__main__":
    sys.exit(run.command(plan, seconds=240))
