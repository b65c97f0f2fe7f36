"""What the Rprop variants reach on a real problem: full-batch training on scikit-learn's digits.

    python -m perf.variants

The training loss after 100 epochs, as the median and the range over ten random initializations of
a 64-32-10 perceptron, in fp32 on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

import tritonopt
from perf import run
from tritonopt.rprop import VARIANTS

SEEDS, EPOCHS = range(10), 100


@cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.tensor(data.data, dtype=torch.float32) / 16
    return pixels, torch.tensor(data.target)


def loss_after(epochs: int, variant: str, seed: int) -> float:
    pixels, targets = digits()
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
    optimizer = tritonopt.Rprop(model.parameters(), lr=0.01, variant=variant)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(pixels), targets)
        loss.backward()
        return loss

    for _ in range(epochs):
        optimizer.step(closure)
    return float(closure().detach())


def records(variant: str, epochs: int) -> Iterator[dict[str, Any]]:
    losses = sorted(loss_after(epochs, variant, seed) for seed in SEEDS)
    found = {"median": median(losses), "least": losses[0], "greatest": losses[-1]}
    yield {"variant": variant, "epochs": epochs, **found}


def jobs() -> run.Jobs:
    return {variant: partial(records, variant, EPOCHS) for variant in VARIANTS}


if __name__ == "__main__":
    sys.exit(run.script("variants", lambda device, quick: jobs()))
