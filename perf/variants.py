"""What the Rprop variants reach on a real problem: full-batch training on scikit-learn's digits.

    python -m perf.variants [epochs]

Prints the table of the README: the training loss after 100 epochs (or as many as given), as the
median and the range over ten random initializations of a 64-32-10 perceptron, in fp32.
"""

from __future__ import annotations

import sys
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import tritonopt
from tritonopt.rprop import VARIANTS

SEEDS = range(10)


@cache
def digits() -> tuple[Tensor, Tensor]:
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


def main() -> None:
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    print(f"| `variant` | loss after {epochs} epochs: median | least | greatest |")
    print("|---|---|---|---|")
    for variant in VARIANTS:
        losses = torch.tensor([loss_after(epochs, variant, seed) for seed in SEEDS])
        median = (losses.sort().values[4] + losses.sort().values[5]) / 2
        print(f'| `"{variant}"` | {median:.2e} | {losses.min():.2e} | {losses.max():.2e} |')


if __name__ == "__main__":
    main()
