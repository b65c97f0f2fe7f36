"""RMSprop of timm and of Stable-Baselines3: theirs, or a stand-in where they are not installed."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

TIMM = {"decoupled_decay": False, "lr_in_momentum": True}  # of its options


def timm_rmsprop_tf(monkeypatch: pytest.MonkeyPatch) -> Any:
    """timm's class without timm's package, whose import needs torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("timm is not installed")
    root = Path(spec.submodule_search_locations[0])
    for name, folder in (("timm", root), ("timm.optim", root / "optim")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        monkeypatch.setitem(sys.modules, name, package)
    return importlib.import_module("timm.optim.rmsprop_tf").RMSpropTF


class RMSpropTF(torch.optim.Optimizer):
    """With the state and the options of timm's RMSpropTF and Stable-Baselines3's RMSpropTFLike."""

    def __init__(self, params, lr=1e-2, alpha=0.9, eps=1e-3, momentum=0.0, extra=None):
        defaults = dict(lr=lr, alpha=alpha, eps=eps, momentum=momentum, centered=False)
        super().__init__(params, {**defaults, "weight_decay": 0, **(extra or {})})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, square_avg=torch.ones_like(p))
                    if group["momentum"] > 0:
                        state["momentum_buffer"] = torch.zeros_like(p)
                state["step"] += 1
                square_avg = state["square_avg"]
                square_avg.add_(p.grad.pow(2) - square_avg, alpha=1 - group["alpha"])
                average = square_avg.add(group["eps"]).sqrt_()
                if group["momentum"] > 0 and group.get("lr_in_momentum"):
                    buffer = state["momentum_buffer"].mul_(group["momentum"])
                    p.sub_(buffer.addcdiv_(p.grad, average, value=group["lr"]))
                elif group["momentum"] > 0:
                    buffer = state["momentum_buffer"].mul_(group["momentum"])
                    p.sub_(buffer.addcdiv_(p.grad, average), alpha=group["lr"])
                else:
                    p.addcdiv_(p.grad, average, value=-group["lr"])


class Timm(RMSpropTF):
    __module__, __qualname__ = "timm.optim.rmsprop_tf", "RMSpropTF"


class StableBaselines3(RMSpropTF):
    __module__ = "stable_baselines3.common.sb2_compat.rmsprop_tf_like"
    __qualname__ = "RMSpropTFLike"
