"""A rule that the library does not have takes every path: eager, compiled, a kernel."""

import copy

import pytest
import torch
from cases import FEW_SHAPES, SHAPES, give_gradients, parameters
from torch import nn

from tritonopt.device import INTERPRET

pytest.importorskip("triton")
from lion import Lion

from tritonopt.optimizer import FusedOptimizer, Rule


class Reference(torch.optim.Optimizer):
    """Lion, one parameter after the other."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(param))
                state["step"] += 1
                param.mul_(1 - lr * group["weight_decay"])
                update = state["exp_avg"].lerp(param.grad, 1 - beta1)
                param.sub_(torch.sign(update) * lr)
                state["exp_avg"].lerp_(param.grad, 1 - beta2)


OPTIONS = {
    "default": {},
    "weight decay": {"weight_decay": 0.1, "lr": 0.01},
    "betas": {"betas": (0.5, 0.3), "lr": 0.02},
}


def both(params, **kwargs):
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    return Lion(params, **kwargs), Reference(copies, **kwargs), copies


def assert_same(ours, theirs, params, copies, exact):
    limits = {"rtol": 0, "atol": 0} if exact else {}
    for param, twin in zip(params, copies, strict=True):
        torch.testing.assert_close(param, twin, **limits)
        assert ours.state.get(param, {}).keys() == theirs.state.get(twin, {}).keys()
        for key, value in theirs.state.get(twin, {}).items():
            torch.testing.assert_close(ours.state[param][key], value, **limits)


@pytest.mark.parametrize("path", ["as it is", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kwargs", OPTIONS.values(), ids=OPTIONS)
def test_parity(kwargs, dtype, path):
    if path == "compiled" and (INTERPRET or dtype == torch.float64):
        pytest.skip("kernels are not compiled by torch; one dtype is enough for Inductor")
    params = parameters(SHAPES, dtype)
    ours, theirs, copies = both(params, **kwargs)
    if path == "compiled":
        ours.compile()
    for step in range(5):
        give_gradients(params, copies, missing={step})
        ours.step()
        theirs.step()
        assert_same(ours, theirs, params, copies, exact=path == "as it is" and not INTERPRET)


def test_half_precision_is_computed_in_single():
    params = parameters(FEW_SHAPES, torch.bfloat16)
    ours, theirs, copies = both(params, lr=0.01)
    for _ in range(3):
        give_gradients(params, copies)
        ours.step()
        theirs.step()
    for param, twin in zip(params, copies, strict=True):
        torch.testing.assert_close(param, twin, rtol=0.02, atol=0.02)


def test_checkpoints_copies_and_groups():
    params = parameters(FEW_SHAPES)
    ours, theirs, copies = both(params, lr=0.01)
    for _ in range(2):
        give_gradients(params, copies)
        ours.step()
        theirs.step()
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    more = parameters([(4, 4)])
    twins = [nn.Parameter(p.detach().clone()) for p in more]
    ours.add_param_group({"params": more, "weight_decay": 0.5})
    theirs.add_param_group({"params": twins, "weight_decay": 0.5})
    for _ in range(2):
        give_gradients(params + more, copies + twins)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, params + more, copies + twins, exact=not INTERPRET)


def test_what_no_launch_takes_is_updated_by_the_eager_rule():
    params = [nn.Parameter(torch.randn(6, 2)[:, 0]), *parameters([(3,)])]
    ours, theirs, copies = both(params, lr=0.01, weight_decay=0.1)
    for _ in range(3):
        give_gradients(params, copies)
        ours.step()
        theirs.step()
        assert_same(ours, theirs, params, copies, exact=not INTERPRET)
    assert "1 left to torch: is not dense" in ours.describe()


def test_clipping_and_loss_scaling_come_along():
    params = parameters(FEW_SHAPES)
    ours, theirs, copies = both(params, lr=0.01)
    clipped = Lion([nn.Parameter(p.detach().clone()) for p in params], lr=0.01, max_grad_norm=0.5)
    others = clipped.param_groups[0]["params"]
    give_gradients(params, others)
    torch.nn.utils.clip_grad_norm_(params, 0.5)
    ours.step()
    clipped.step()
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other)
        torch.testing.assert_close(ours.state[param]["exp_avg"], clipped.state[other]["exp_avg"])


def test_described_and_named():
    ours = Lion(parameters([(3,), (5,)]))
    assert "2         0      0         8" in ours.describe()
    assert not ours.state


def test_torch_checks_a_capture_of_it(monkeypatch):
    params = parameters(SHAPES)
    optimizer = Lion(params)
    give_gradients(params, params)
    optimizer.step()
    capturing = [False]
    stream = type("Stream", (), {"is_capturing": lambda self: capturing[0]})()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # torch 2.11 asks these two
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    optimizer.step()
    assert not optimizer.defaults["capturable"]
    capturing[0] = True
    with pytest.raises(RuntimeError, match="capturable is False"):
        optimizer.step()


def decaying_(param, grad, momentum_buffer, scratch, *, lr, step):
    momentum_buffer.mul_(0.5).add_(grad)
    param.sub_(momentum_buffer * (lr / step))


class Decaying(FusedOptimizer):
    """Momentum under an lr that falls with the number of steps; on a CPU only."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def rule(self, group):
        keys = ("momentum_buffer",)
        return Rule("Decaying", decaying_, None, keys, keys, takes_step=True)

    def hyper(self, group):
        return {"lr": group["lr"]}


@pytest.mark.skipif(INTERPRET, reason="it has no kernel")
@pytest.mark.parametrize("path", ["as it is", "compiled"])
def test_a_rule_that_takes_the_step_over_real_and_complex_parameters(path):
    params = [*parameters([(3,), (4, 5)]), nn.Parameter(torch.randn(2, 3, dtype=torch.complex64))]
    values = [param.detach().clone() for param in params]
    buffers = [torch.zeros_like(value) for value in values]
    optimizer = Decaying([{"params": params[:1]}, {"params": params[1:], "lr": 0.3}])
    if path == "compiled":
        optimizer.compile()
    for step in range(1, 5):
        give_gradients(params, params)
        optimizer.step()
        for param, value, buffer, lr in zip(params, values, buffers, (0.1, 0.3, 0.3), strict=True):
            buffer.mul_(0.5).add_(param.grad)
            value.sub_(buffer * (lr / step))
            torch.testing.assert_close(param.detach(), value)
            torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], buffer)


def test_what_an_option_may_hold_is_the_rules_affair():
    """Types are checked of torch's options alone."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": None}]
    assert Lion(groups, weight_decay=0.1).param_groups[1]["weight_decay"] is None
