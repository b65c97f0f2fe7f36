"""Modules as users write them, with the optimizer's class as an argument; run as a script: DDP."""

from __future__ import annotations

import sys
import warnings

import lightning
import torch
from cases import OURS, TORCH, ulps
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

QUIET = {
    "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False, "accelerator": "cpu", "devices": 1, "max_epochs": 3,
}  # fmt: skip


def loader():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 6, generator=generator)
    return DataLoader(TensorDataset(x, x @ torch.randn(6, 2, generator=generator)), batch_size=8)


class Module(lightning.LightningModule):
    def __init__(self, make, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.Tanh(), nn.BatchNorm1d(16), nn.Linear(16, 2)
        )  # fmt: skip
        self.make, self.kwargs = make, {"lr": 0.005, **kwargs}

    def training_step(self, batch, index):
        loss = (self.net(batch[0].to(self.dtype)) - batch[1]).square().mean()
        self.log("loss", loss.detach().float())
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return self.make(self.parameters(), **self.kwargs)


class Scheduled(Module):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
        return {
            "optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}
        }  # fmt: skip


class Monitored(Module):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, threshold=0.9, patience=0)
        return {
            "optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}
        }  # fmt: skip


class Manual(Module):
    """Two optimizers over parameters of which they share some."""

    automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()[index % 2]
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()

    def configure_optimizers(self):
        return [self.make(part.parameters(), **self.kwargs) for part in (self.net, self.net[2:])]


class Frozen(Module):
    """The first layer rests in epoch 1."""

    def on_train_epoch_start(self):
        self.net[0].requires_grad_(self.current_epoch != 1)


class FrozenFirst(Module):
    """The first layer rests in epoch 0, and is frozen already when the optimizer is built."""

    def configure_optimizers(self):
        self.net[0].requires_grad_(False)
        return super().configure_optimizers()

    def on_train_epoch_start(self):
        self.net[0].requires_grad_(self.current_epoch > 0)


class Skipping(Module):
    def training_step(self, batch, index):
        return None if index % 3 == 1 else super().training_step(batch, index)


class Unlogged(Module):
    """Dynamo of torch 2.13 cannot trace Lightning's `log`."""

    def log(self, *_):
        pass


class Early(Module):
    """The optimizer exists before the trainer casts the model."""

    def __init__(self, make, **kwargs):
        super().__init__(make, **kwargs)
        self.early = super().configure_optimizers()

    def configure_optimizers(self):
        return self.early


class Judged(Module):
    """Beside each step of ours: torch's on the same values, in fp32 and in its own precision."""

    def on_before_optimizer_step(self, optimizer):
        self.old = None
        if not isinstance(optimizer, tuple(OURS.values())) or not optimizer.state:
            return  # the first step makes state in the parameter's precision
        self.old = [p.detach().clone() for p in self.net.parameters()]
        self.exact = self.judge(optimizer, torch.float32)
        self.own = self.judge(optimizer, self.dtype)

    def judge(self, optimizer, dtype):
        copies = [nn.Parameter(p.detach().to(dtype, copy=True)) for p in self.net.parameters()]
        theirs = TORCH[type(optimizer).__name__](copies, foreach=False, **self.kwargs)
        for param, copy in zip(self.net.parameters(), copies, strict=True):
            copy.grad = param.grad.to(dtype, copy=True)
            theirs.state[copy] = {
                key: value.to(value.dtype if key == "step" else dtype, copy=True)
                for key, value in optimizer.state[param].items()
            }
        theirs.step()
        return [{"param": copy.detach(), **theirs.state[copy]} for copy in copies]

    def on_train_batch_end(self, *_):
        optimizer = self.trainer.optimizers[0]
        if self.old is None:
            return
        rows = zip(self.net.parameters(), self.old, self.exact, self.own, strict=True)
        for param, old, exact, own in rows:
            for key, value in {"param": param.detach(), **optimizer.state[param]}.items():
                assert torch.equal(value, exact[key].to(value.dtype)), key
                scale = torch.maximum(old.abs(), (value - old).abs()) if key == "param" else value
                assert ulps(value, own[key], scale) <= 1, key


def outcome(trainer, module):
    """Parameters, state, learning rates and what was logged."""
    saved = [optimizer.state_dict() for optimizer in trainer.optimizers]
    return {
        "module": {key: value.clone() for key, value in module.state_dict().items()},
        "state": [
            {key: state for key, state in one["state"].items() if state.get("step", 0) > 0}
            for one in saved
        ],
        "lr": [group["lr"] for one in saved for group in one["param_groups"]],
        "logged": dict(trainer.callback_metrics),
    }


def assert_equal(ours, theirs, where="", rtol=0.0):
    """A tolerance is for half precision, which torch's own steps round several times."""
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol, msg=where, equal_nan=True)
    elif isinstance(theirs, (dict, list)):
        assert len(ours) == len(theirs), where
        for key in theirs if isinstance(theirs, dict) else range(len(theirs)):
            assert_equal(ours[key], theirs[key], f"{where}.{key}", rtol)
    else:
        assert ours == theirs, where


def ddp():
    """Two processes, launched by Lightning. Ends with an error where the runs differ."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in OURS:
        ends = []
        for make in (OURS[name], TORCH[name]):
            trainer = lightning.Trainer(**{**QUIET, "devices": 2}, strategy="ddp")
            module = Module(make)
            trainer.fit(module, loader())
            ends.append(outcome(trainer, module))
        assert_equal(*ends)


if __name__ == "__main__":
    sys.exit(ddp())
