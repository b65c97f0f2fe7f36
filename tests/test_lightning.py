"""Training in Lightning: with our optimizers every run equals torch's to the last bit."""

from __future__ import annotations

import pytest
import torch
from cases import OURS, TORCH
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning")

import tritonopt.lightning  # noqa: E402

BATCHES, BATCH = 6, 8


def loader(limit=BATCHES):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(limit * BATCH, 6, generator=generator)
    y = x @ torch.randn(6, 2, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=BATCH)


class Module(lightning.LightningModule):
    """The optimizer is a factory: `configure_optimizers` is what users write."""

    def __init__(self, optimizer, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.BatchNorm1d(16),
            torch.nn.Linear(16, 2),
        )  # fmt: skip
        self.optimizer, self.kwargs = optimizer, kwargs

    def training_step(self, batch, index):
        x, y = batch
        loss = (self.net(x.to(self.dtype)) - y.to(self.dtype)).square().mean()
        self.log("loss", loss.detach().float())
        return loss

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), **self.kwargs)
