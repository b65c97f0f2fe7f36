"""What the tests of `step_in_backward` train."""

from __future__ import annotations

from typing import Any

import torch
from cases import OURS
from torch import nn
from torch.utils.checkpoint import checkpoint

import tritonopt


class Network(nn.Module):
    """Shares a weight between layers, has a branch that not every pass takes, and a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))
        self.layers[3].weight = self.layers[1].weight
        self.scale = nn.Parameter(torch.ones(()))
        self.layers[0].bias.requires_grad_(False)

    def forward(self, x: Any, skip: int | None = None, recomputed: bool = False) -> Any:
        for index, layer in enumerate(self.layers):
            if index != skip:
                run = nn.Sequential(layer, nn.Tanh())
                x = checkpoint(run, x, use_reentrant=False) if recomputed else run(x)
        return (x * self.scale).square().sum()


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def attached(name: str, bucket_bytes: int = 0, **options: Any) -> tuple[Any, Any, Any]:
    """A model, its optimizer, and the handle."""
    model = network()
    optimizer = OURS[name](model.parameters(), **options)
    return model, optimizer, tritonopt.step_in_backward(model, optimizer, bucket_bytes)
