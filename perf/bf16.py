"""Does bf16 learn what fp32 learns? Plain, and with each option: `python -m perf.bf16`

A small network learns handwritten digits from the same three starts in each precision. With a small
`lr`, updates of less than half a unit in a parameter's last place are lost. With an `alpha` near 1,
an average of squared gradients that is bf16 never shrinks, and so updates become too small. The
loss is over all digits, in fp32. With `--out perf/results` it writes bf16.json and draws bf16.png.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import tritonopt
from perf import run
from perf.implementations import IMPLEMENTATIONS
from perf.report import draw

SEEDS = range(3)
POINTS = 20  # of a curve of losses, besides the first
NAMES = ("tritonopt", "state_dtype=torch.float32", "stochastic_rounding=True", "master='split'")


class Training(NamedTuple):
    label: str  # begins with the class
    options: dict[str, Any]
    steps: int
    size: int | None  # of a batch; None: all digits, as Rprop compares signs from step to step


TRAININGS = [
    Training("RMSprop, lr=1e-4", {"lr": 1e-4}, 500, 128),
    Training("RMSprop, lr=1e-2, alpha=0.999", {"lr": 1e-2, "alpha": 0.999}, 800, 128),
    Training("Rprop, lr=1e-3", {"lr": 1e-3, "step_sizes": (1e-6, 1e-2)}, 80, None),
]


def train(
    training: Training, device: torch.device, dtype: torch.dtype, name: str, seed: int
) -> tuple[list[float], float, float]:
    """Losses from the first to the last, how far the parameters went, the sum of `square_avg`."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    network.bfloat16().to(device, dtype)
    params = list(network.parameters())
    start = [param.detach().clone() for param in params]
    make = getattr(tritonopt, training.label.split(",")[0])
    optimizer = make(params, **training.options, **IMPLEMENTATIONS[name].options)
    data = load_digits()
    pixels = torch.tensor(data.data, dtype=torch.float32, device=device) / 16
    digits = torch.tensor(data.target, device=device)

    @torch.no_grad()
    def loss_of_all() -> float:
        single = {key: param.float() for key, param in network.named_parameters()}
        return float(cross_entropy(torch.func.functional_call(network, single, pixels), digits))

    losses = [loss_of_all()]
    for step in range(1, training.steps + 1):
        some = torch.randint(len(digits), (training.size,)) if training.size else ...
        network.zero_grad()
        cross_entropy(network(pixels[some].to(dtype)).float(), digits[some]).backward()
        optimizer.step()
        if step * POINTS % training.steps < POINTS:
            losses.append(loss_of_all())
    both = zip(params, start, strict=True)
    ways = torch.stack([(param.detach().float() - first).norm() for param, first in both])
    averages = [entry.get("square_avg", torch.zeros(0)) for entry in optimizer.state.values()]
    return losses, float(ways.norm()), sum(float(average.float().sum()) for average in averages)


def records(training: Training, device: torch.device, seeds: range) -> Iterator[dict[str, Any]]:
    for dtype, name in [(torch.float32, NAMES[0]), *((torch.bfloat16, name) for name in NAMES)]:
        found = [train(training, device, dtype, name, seed) for seed in seeds]
        curves, ways, squares = zip(*found, strict=True)
        yield {
            "optimizer": training.label, "dtype": str(dtype), "implementation": name,
            "steps": training.steps, "losses": list(map(median, zip(*curves, strict=True))),
            **{key: {"median": median(of), "least": min(of), "most": max(of)} for key, of in
               (("loss", [curve[-1] for curve in curves]), ("way", ways), ("squares", squares))},
        }  # fmt: skip


def plan(device: torch.device, quick: bool) -> list[run.Job]:
    seeds = SEEDS[:1] if quick else SEEDS
    jobs = [(one.label, partial(records, one, device, seeds)) for one in TRAININGS]
    return [run.Job("bf16", *job, seconds=120, env={"OMP_NUM_THREADS": "1"}) for job in jobs]


if __name__ == "__main__":
    sys.exit(run.command(plan, seconds=300, stem="bf16", draw=draw))
