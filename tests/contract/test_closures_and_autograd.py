"""When gradients are read, and what autograd notices."""

import copy

import pytest
import torch
from cases import OURS, TORCH, assert_follows, follow, give_gradients, parameters, twins
from torch import nn

import tritonopt

SHAPES = [(3, 5), (40,), (), (64,), (7,)]
OPTIONS = {"RMSprop": {"weight_decay": 0.1, "momentum": 0.9, "centered": True}, "Rprop": {}}


def both(name, device="cpu", shapes=SHAPES, **kwargs):
    params = parameters(shapes, device=device)
    return params, *twins(name, params, lr=0.05, **OPTIONS[name], **kwargs)


def values(optimizer, params):
    """Parameters and state, copied."""
    state = [{k: t.clone() for k, t in optimizer.state[p].items()} for p in params]
    return [p.detach().clone() for p in params], state


def assert_unchanged(optimizer, params, before):
    for mine, then in zip(values(optimizer, params), before, strict=True):
        torch.testing.assert_close(mine, then, rtol=0, atol=0)


# Closures.


def test_a_closure_runs_with_gradients_and_is_gathered_after(name):
    model = nn.Linear(5, 3)
    twin = copy.deepcopy(model)
    ours = OURS[name](model.parameters())
    theirs = TORCH[name](twin.parameters(), foreach=False)
    params, copies = [*model.parameters()], [*twin.parameters()]
    inputs = torch.randn(4, 5)

    def closure_of(net, optimizer):
        def closure():
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = net(inputs).square().sum()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            return loss

        return closure

    for param in params:  # stale: must not be used
        param.grad = torch.full_like(param, 100.0)
    with torch.no_grad():
        for _ in range(4):
            mine, other = ours.step(closure_of(model, ours)), theirs.step(closure_of(twin, theirs))
            torch.testing.assert_close(mine, other)
            assert mine.requires_grad
            assert not torch.is_grad_enabled()
            assert_follows(ours, theirs, params, copies)


def test_what_a_closure_returns(name):
    params, ours, *_ = both(name)
    give_gradients(params, params)
    assert ours.step() is None
    assert ours.step(lambda: None) is None
    assert ours.step(closure=lambda: 3.5) == 3.5


def test_a_closure_that_moves_everything(name):
    params, ours, theirs, copies = both(name)
    follow(ours, theirs, params, copies, 2)
    for _ in range(3):
        give_gradients(params, copies, {1})

        def closure():
            for param in params:
                param.data = param.data.clone()
            ours.param_groups[0]["maximize"] = True
            ours.load_state_dict(copy.deepcopy(ours.state_dict()))

        theirs.param_groups[0]["maximize"] = True
        ours.step(closure)
        theirs.step()
        assert_follows(ours, theirs, params, copies)


def test_a_closure_that_raises_changes_nothing(name):
    params, ours, *_ = both(name)
    give_gradients(params, params)
    ours.step()
    before = values(ours, params)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        ours.step(lambda: 1 / 0)
    assert torch.is_grad_enabled()
    assert_unchanged(ours, params, before)


# Autograd.


def test_a_backward_after_the_step_notices(name, device):
    params, ours, *_ = both(name, device)
    for _ in range(3):
        loss = sum((p**3).sum() for p in params)
        loss.backward(retain_graph=True)
        ours.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        ours.zero_grad()


def use_again(optimizer):
    """Other tensors of the same memory, which have version counters of their own."""
    for entry in optimizer.state.values():
        entry.update({key: tensor.data for key, tensor in entry.items()})


ORIGINS = {
    "made": lambda optimizer: None,
    "loaded": lambda optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "used again": use_again,
}


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_backward_notices_that_state_was_written(name, device, origin, compiled):
    params, ours, *_ = both(name, device)
    if compiled:
        ours.compile()
    give_gradients(params, params)
    ours.step()
    ours.step()
    ORIGINS[origin](ours)
    weight = torch.ones((), device=device, requires_grad=True)
    for without_gradient in (None, None, params[1]):
        entries = [ours.state[p] for p in params if p is not without_gradient]
        losses = [(weight * t).sum() for entry in entries for t in entry.values()]
        if without_gradient is not None:
            without_gradient.grad = None
        ours.step()
        for loss in losses:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_a_backward_through_a_skipped_parameter_does_not(name):
    params, ours, *_ = both(name)
    for _ in range(3):
        losses = [(p**3).sum() for p in params]
        losses[0].backward(retain_graph=True)
        ours.step()
        ours.zero_grad()
        losses[1].backward()
        params[1].grad = None


def test_an_optimizer_in_the_backward(name):
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    twin = copy.deepcopy(model)
    kinds = {model: OURS[name], twin: lambda params: TORCH[name](params, foreach=False)}
    for net, kind in kinds.items():
        for param in net.parameters():
            optimizer = kind([param])

            def update(param, optimizer=optimizer):
                optimizer.step()
                optimizer.zero_grad()

            param.register_post_accumulate_grad_hook(update)
    for _ in range(4):
        inputs = torch.randn(2, 5)
        for net in kinds:
            net(inputs).square().sum().backward()
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(param, other, rtol=2e-5, atol=2e-5)


def test_differentiable_steps(name):
    """Autograd through the step: with respect to the gradient that was used."""
    results = []
    for kind in (OURS[name], TORCH[name]):
        torch.manual_seed(0)
        start = torch.randn(5, requires_grad=True, dtype=torch.float64)
        grad = torch.randn(5, requires_grad=True, dtype=torch.float64)
        param = start.clone()
        param.grad = grad
        optimizer = kind([param], lr=0.1, differentiable=True)
        optimizer.step()
        results.append((param, *torch.autograd.grad(param.sum(), (start, grad))))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_fast_path_is_taken_for_these(name):
    """Else none of the above would say anything of it."""
    _, ours, *_ = both(name)
    assert isinstance(ours, tritonopt.RMSprop | tritonopt.Rprop)
    assert "torch:" not in ours.describe()
