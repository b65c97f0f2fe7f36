"""A step that fails, is interrupted or skipped changes nothing."""

import copy

import pytest
import torch
from cases import (
    OURS,
    TORCH,
    assert_follows,
    follow,
    give_gradients,
    parameters,
    twins,
)
from torch import nn

from tritonopt import plan

SHAPES = [(3, 5), (40,), (), (64,), (7,)]


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
def test_an_interrupted_step(name, first, monkeypatch):
    """Control-C in the second group: the next step is as if it had not been asked for."""
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params[:3], lr=0.1)
    copies += [nn.Parameter(p.detach().clone()) for p in params[3:]]
    ours.add_param_group({"params": params[3:], "maximize": True})
    theirs.add_param_group({"params": copies[3:], "maximize": True})
    if not first:
        follow(ours, theirs, params, copies)
    give_gradients(params, copies)
    update, calls = plan.Plan.__call__, []

    def interrupted(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return update(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(plan.Plan, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ours.step()
    assert torch.is_grad_enabled()
    for param in copies[3:]:
        param.grad = None
    theirs.step()
    follow(ours, theirs, params, copies)


def test_a_sparse_gradient_changes_nothing(name):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params, lr=0.1)
    give_gradients(params, copies)
    params[3].grad = None
    params[3].grad = torch.ones(64).to_sparse()
    before = [param.detach().clone() for param in params]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="sparse gradients"):
            ours.step()
        assert not ours.state and all(map(torch.equal, params, before))
    follow(ours, theirs, params, copies)


def test_state_that_lacks_a_key_changes_nothing(name):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params, lr=0.1)
    give_gradients(params, copies, missing={2})
    ours.step()
    theirs.step()
    for optimizer, some in ((ours, params), (theirs, copies)):
        optimizer.state[some[1]].pop({"RMSprop": "square_avg", "Rprop": "prev"}[name])
    give_gradients(params, copies)
    for optimizer in (ours, theirs):
        with pytest.raises(KeyError):
            optimizer.step()
    assert params[2] not in ours.state
    assert float(ours.state[params[0]]["step"]) == float(theirs.state[copies[0]]["step"])


def test_a_missing_loss_changes_nothing():
    params = parameters(SHAPES)
    optimizer = OURS["Rprop"](params, variant="irprop+")
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="needs the loss"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("skipped", [{0}, {1, 2}, {0, 3}], ids=str)
def test_a_skipped_step_leaves_no_trace(name, options, skipped):
    params = parameters(SHAPES)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    ours = OURS[name](params, lr=0.1, fused_amp=True, **options)
    theirs = TORCH[name](copies, lr=0.1, **{**options, "foreach": False})
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2)]
    for turn in range(5):
        for scaler, optimizer, some in zip(scalers, (ours, theirs), (params, copies), strict=True):
            generator = torch.Generator().manual_seed(turn)
            scaler.scale(torch.ones(()))
            for index, param in enumerate(some):
                param.grad = 8 * torch.randn(param.shape, generator=generator)
                if turn in skipped and index == 1:
                    param.grad[0] = torch.inf
            if turn in skipped and optimizer is ours:
                before = copy.deepcopy((params, ours.state_dict()))
            scaler.step(optimizer)
            scaler.update(8.0)
        if turn in skipped:
            after = ours.state_dict()
            assert after["state"].keys() == before[1]["state"].keys()
            assert (turn > 0) == bool(after["state"]) or turn - 1 in skipped
            for index, entry in before[1]["state"].items():
                for key, value in entry.items():
                    assert torch.equal(after["state"][index][key], value)
            assert all(map(torch.equal, params, before[0]))
        assert len(ours.state) == len(theirs.state)
        assert_follows(ours, theirs, params, copies)


def test_an_option_that_torch_lacks_is_refused_at_every_step(name):
    """State that was made before it was refused is gone, and no plan knows it."""
    options = {"eps_in_sqrt": True} if name == "RMSprop" else {"variant": "rprop+"}
    params = [*parameters(SHAPES), nn.Parameter(torch.randn(3, dtype=torch.complex64))]
    ours = OURS[name](params[:-1], **options)
    give_gradients(params, params)
    ours.step()
    ours.add_param_group({"params": [nn.Parameter(torch.randn(4)), params[-1]]})
    give_gradients(ours.param_groups[1]["params"], ours.param_groups[1]["params"])
    values = [p.detach().clone() for group in ours.param_groups for p in group["params"]]
    for _ in range(3):
        with pytest.raises(ValueError, match="is not in torch's implementation"):
            ours.step()
        assert len(ours.state) == len(SHAPES)
        now = [p.detach() for group in ours.param_groups for p in group["params"]]
        assert all(map(torch.equal, now, values))


def test_an_option_that_is_no_number_and_then_put_right(name):
    params = parameters(SHAPES)
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    ours = OURS[name]([{"params": [param]} for param in params], lr=0.1)
    theirs = TORCH[name]([{"params": [copy]} for copy in copies], lr=0.1, foreach=False)
    follow(ours, theirs, params, copies, steps=1)
    key = "momentum" if name == "RMSprop" else "step_sizes"
    for group in (ours.param_groups[1], ours.param_groups[-1]):
        right, group[key] = group[key], ("a", "b")
        give_gradients(params, copies)
        with pytest.raises((TypeError, ValueError)):
            ours.step()
        group[key] = right
        follow(ours, theirs, params, copies, steps=2)
