"""What the tests of variants share: combinations of options, and a valley to train in."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import tritonopt

VARIANTS = ("irprop-", "rprop-", "rprop+", "irprop+")

STARTS, WIDTH = 20, 4
STEPS = 50

MOMENTUM = {
    "": {},
    "momentum": {"momentum": 0.9},
    "lr in momentum": {"momentum": 0.9, "lr_in_momentum": True},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "nesterov, lr in momentum": {"momentum": 0.9, "nesterov": True, "lr_in_momentum": True},
}
DECAY = {
    "": {},
    "weight decay": {"weight_decay": 0.1},
    "decoupled decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
}
FLAGS = {
    "eps in sqrt": {"eps_in_sqrt": True},
    "bias correction": {"bias_correction": True},
    "centered": {"centered": True},
    "initial scale": {"initial_scale": 0.5},
}


def every_combination() -> list[Any]:
    rows = []
    for (momentum, a), (decay, b) in itertools.product(MOMENTUM.items(), DECAY.items()):
        for used in itertools.product((False, True), repeat=len(FLAGS)):
            names = [name for name, use in zip(FLAGS, used, strict=True) if use]
            options = {**a, **b}
            for name in names:
                options.update(FLAGS[name])
            title = ", ".join(filter(None, (momentum, decay, *names))) or "plain"
            rows.append(pytest.param(options, id=title))
    return rows


COMBINATIONS = every_combination()
ON_BOTH_PATHS = COMBINATIONS[::16] + COMBINATIONS[15::16] + COMBINATIONS[-17:-13]
"""Each momentum and decay with no flag and with all, and some between: interpreting is slow."""


def valley(w: Tensor) -> Tensor:
    """A curved valley of each start: Rosenbrock's function, scaled, and a bowl."""
    a, b = w[..., :-1], w[..., 1:]
    return (5 * (b - a**2) ** 2 + (1 - a) ** 2).sum() + 0.1 * w.square().sum()


def random_starts() -> Tensor:
    return torch.randn(STARTS, WIDTH, dtype=torch.float64, generator=torch.manual_seed(3))


def train(optimizer: Any, params: Any, steps: int = STEPS) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([valley(param) for param in params]).sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def trained(name: str, start: Tensor, steps: int = STEPS, **options: Any) -> Tensor:
    param = torch.nn.Parameter(start.clone())
    train(getattr(tritonopt, name)([param], **options), [param], steps)
    return param.detach()
