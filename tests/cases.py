"""The tables that the tests run over, and what they compare."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonopt
from tritonopt import slab
from tritonopt.device import path

OURS = {"RMSprop": tritonopt.RMSprop, "Rprop": tritonopt.Rprop}
TORCH = {"RMSprop": torch.optim.RMSprop, "Rprop": torch.optim.Rprop}

try:  # the tables of torch's own tests
    from torch.testing._internal.common_optimizers import optim_db
except ImportError:  # they need expecttest, which not every machine has
    optim_db = []
INFO = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in OURS}

MORE = {
    "RMSprop": {
        "default": {},
        "weight_decay alone": {"weight_decay": 0.1},
        "tensor lr": {"lr": torch.tensor(0.005)},
        "momentum alone": {"momentum": 0.9},
        "centered alone": {"centered": True},
        "centered, momentum": {"centered": True, "momentum": 0.9},
        "large eps": {"eps": 1.0, "alpha": 0.5},
        "alpha 0": {"alpha": 0.0},
        "everything": {
            "lr": 0.003, "alpha": 0.9, "eps": 1e-4, "weight_decay": 0.01,
            "momentum": 0.7, "centered": True, "maximize": True,
        },
    },
    "Rprop": {
        "default": {},
        "tensor lr": {"lr": torch.tensor(0.005)},
        "steep etas": {"etas": (0.3, 2.5)},
        "lr above step_sizes": {"lr": 100.0},
        "lr below step_sizes": {"lr": 1e-9},
        "step_sizes reversed": {"step_sizes": (50, 1e-6)},
        "narrow step_sizes": {"step_sizes": (0.004, 0.02)},
        "maximize, etas": {"maximize": True, "etas": (0.7, 1.1)},
    },
}  # fmt: skip


def configurations(name: str) -> list[Any]:
    """All of torch's own configurations of an optimizer, and ours."""
    torchs = INFO[name].optim_inputs_func(device="cpu") if INFO else []
    rows = {row.desc: row.kwargs for row in torchs} | MORE[name]
    return [pytest.param(name, kwargs, id=f"{name}-{desc}") for desc, kwargs in rows.items()]


CONFIGURATIONS = configurations("RMSprop") + configurations("Rprop")

SHAPES = [(), (0,), (1,), (3, 5), (1023,), (1024,), (0, 4), (1025,), (2, 3, 4, 5), (7, 300)]
"""Scalar, empty (first, in the middle), one less and more than a block, odd, several blocks."""

FEW_SHAPES = [(3, 5), (40,), (), (64,), (7,)]
"""None larger than a piece, with padding after each."""

TOLERANCE = {
    torch.float32: 2.0,  # a GPU's operators may be compiled to other roundings than sm_90's
    torch.float64: 2.0,  # likewise; the interpreter emulates a fused multiply-add
    torch.bfloat16: 2.0,  # of a result rounded once, to either side; the interpreter truncates
    torch.float16: 1.0,  # of a result rounded once, to either side
}
"""Per step, in units of the last place of the larger operand, where `is_exact` does not hold."""


def is_exact(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a step agrees with torch's for-loop to the last bit."""
    if name == "Rprop" or path(device)[0] == "eager":
        return dtype in (torch.float32, torch.float64)
    return dtype == torch.float32 and device.type == "cpu"


def parameters(
    shapes: Any = SHAPES, dtype: torch.dtype = torch.float32, device: Any = "cpu"
) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]


def twins(
    name: str, params: list[Any], **kwargs: Any
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer, list[nn.Parameter]]:
    """Our optimizer on `params`, torch's for-loop on copies of them, and the copies."""
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    for param, copy in zip(params, copies, strict=True):
        copy.requires_grad_(param.requires_grad)
    return OURS[name](params, **kwargs), TORCH[name](copies, foreach=False, **kwargs), copies


def give_gradients(params: list[Any], copies: list[Any], missing: Any = ()) -> None:
    """The same random gradients to both; none to the indices in `missing`."""
    for index, (param, copy) in enumerate(zip(params, copies, strict=True)):
        if index in missing:
            param.grad = copy.grad = None
        else:
            param.grad = torch.randn_like(param)
            copy.grad = param.grad.detach().clone()


def take_steps(model: Any, optimizer: Any, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()


def assert_same(ours: Any, theirs: Any, params: list[Any], copies: list[Any]) -> None:
    """Parameters and every state key equal to the last bit."""
    for index, (param, copy) in enumerate(zip(params, copies, strict=True)):
        assert torch.equal(param, copy), f"parameter {index} {tuple(param.shape)}"
        for key, value in theirs.state[copy].items():
            assert torch.equal(ours.state[param][key], value), f"{key} of parameter {index}"


def ulps(actual: Tensor, expected: Tensor, scale: Tensor) -> float:
    """The largest difference in units of the last place of the larger of expected and scale."""
    if not actual.numel():
        return 0.0
    size = torch.maximum(expected.abs(), scale.abs()).double()
    unit = torch.finfo(actual.dtype).eps * size.clamp(min=torch.finfo(actual.dtype).tiny)
    return float(((actual.double() - expected.double()).abs() / unit).nan_to_num(0).max())


def assert_follows(
    ours: Any, theirs: Any, params: list[Any], copies: list[Any], **limits: float
) -> None:
    """Equal to the last bit; closely where kernels round RMSprop's square root as torch may not.

    NaN equals NaN. Only what torch has state for is compared, as plain tensors.
    """
    exact = isinstance(ours, tritonopt.Rprop) or path(params[0].device)[0] == "eager"
    limits = limits or ({"rtol": 0, "atol": 0} if exact else {"rtol": 2e-5, "atol": 2e-6})
    for index, (param, copy) in enumerate(zip(params, copies, strict=True)):
        pairs = {"value": (param.detach(), copy.detach())}
        pairs |= {k: (ours.state[param][k], v) for k, v in theirs.state.get(copy, {}).items()}
        for key, (actual, expected) in pairs.items():
            torch.testing.assert_close(
                actual.as_subclass(Tensor), expected.as_subclass(Tensor), equal_nan=True, **limits,
                msg=lambda text, i=index, k=key: f"{k} of parameter {i}: {text}",
            )  # fmt: skip


def follow(ours: Any, theirs: Any, params: list[Any], copies: list[Any], steps: int = 3) -> None:
    """Steps of both with the same gradients, compared after each."""
    for _ in range(steps):
        give_gradients(params, copies)
        ours.step()
        theirs.step()
        assert_follows(ours, theirs, params, copies)


def network(device: Any = "cpu") -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(6, 5), nn.BatchNorm1d(5)
    model = nn.Sequential(*layers)
    model.register_parameter("empty", nn.Parameter(torch.zeros(0, 3)))
    return model.to(device)


def pair(name: str, model: nn.Module, **kwargs: Any) -> tuple[Any, Any, nn.Module]:
    """Our optimizer on the model, torch's for-loop on a copy of it, and the copy."""
    twin = deepcopy(model)
    ours = OURS[name](model.parameters(), **kwargs)
    return ours, TORCH[name](twin.parameters(), foreach=False, **kwargs), twin


def lists(*models: nn.Module) -> list[list[Any]]:
    return [list(model.parameters()) for model in models]


def set_data(model: nn.Module) -> None:
    for param in model.parameters():
        param.data = param.data.clone()


def is_packed(optimizer: Any, params: Any) -> bool:
    return all(
        slab.find(tensor) is not None
        for param in params
        for tensor in (param, *optimizer.state[param].values())
        if tensor.numel()
    )


def train_alone(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """What a spawned process does: it imports this by the name of a module that it can find."""
    torch.set_num_threads(1)
    for _ in range(3):
        for param in params:
            param.grad = torch.full_like(param, 10.0)
        optimizer.step()
