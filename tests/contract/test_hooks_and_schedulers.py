"""Hooks, schedulers, scalers and averages work as around torch's optimizers."""

import copy

import pytest
import torch
from cases import OURS, TORCH, assert_follows, follow, give_gradients, parameters, twins
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

SHAPES = [(3, 5), (40,), (), (64,)]


def one_step(optimizer, params):
    give_gradients(params, params)
    optimizer.step()


# Hooks.


def test_all_hooks(name):
    calls = []

    def note(what):
        return lambda *args, **kwargs: calls.append((what, args[0]))

    params = parameters(SHAPES)
    ours = OURS[name](params)
    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        ours.register_step_pre_hook(note("pre")),
        ours.register_step_post_hook(note("post")),
        ours.register_state_dict_pre_hook(note("state pre")),
        ours.register_state_dict_post_hook(note("state post")),
        ours.register_load_state_dict_pre_hook(note("load pre")),
        ours.register_load_state_dict_post_hook(note("load post")),
    ]
    one_step(ours, params)
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    for handle in handles:
        handle.remove()
    one_step(ours, params)
    ours.state_dict()
    expected = ["global pre", "pre", "post", "global post", "state pre", "state post", "load pre",
                "load post"]  # fmt: skip
    assert sorted(what for what, _ in calls) == sorted(expected)
    assert all(who is ours for _, who in calls)


STEP_HOOKS = {
    "global pre": lambda _, hook: register_optimizer_step_pre_hook(hook),
    "global post": lambda _, hook: register_optimizer_step_post_hook(hook),
    "pre": lambda optimizer, hook: optimizer.register_step_pre_hook(hook),
    "post": lambda optimizer, hook: optimizer.register_step_post_hook(hook),
}


@pytest.mark.parametrize("register", STEP_HOOKS.values(), ids=STEP_HOOKS)
def test_a_step_hook_alone(name, register):
    params = parameters(SHAPES)
    ours = OURS[name](params)
    one_step(ours, params)
    calls = []
    handle = register(ours, lambda optimizer, args, kwargs: calls.append(optimizer))
    one_step(ours, params)
    handle.remove()
    one_step(ours, params)
    assert calls == [ours]


def test_a_profiler_sees_the_step(name):
    params = parameters(SHAPES)
    ours = OURS[name](params)
    with torch.profiler.profile() as profile:
        one_step(ours, params)
    assert f"Optimizer.step#{name}.step" in {event.key for event in profile.key_averages()}


def test_a_pre_hook_that_changes_everything(name):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)

    def change(optimizer, args, kwargs):
        for param in optimizer.param_groups[0]["params"]:
            param.grad = param.grad * -2
            param.data = param.data.clone()

    for optimizer in (ours, theirs):
        optimizer.register_step_pre_hook(change)
    follow(ours, theirs, params, copies)


def test_a_pre_hook_that_gives_a_closure(name):
    params = parameters(SHAPES)
    ours = OURS[name](params)
    ours.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 2.5), {}))
    give_gradients(params, params)
    assert ours.step() == 2.5


def test_hooks_that_change_checkpoints(name):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 2)
    ours.register_state_dict_post_hook(lambda opt, state: {**state, "more": 1})
    assert ours.state_dict()["more"] == 1
    kept = copy.deepcopy(theirs.state_dict())
    ours.register_load_state_dict_pre_hook(lambda opt, state: copy.deepcopy(kept))
    theirs.load_state_dict(copy.deepcopy(kept))
    ours.load_state_dict({"param_groups": [], "state": {}})
    follow(ours, theirs, params, copies, 3)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(name, to_none):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)
    for _ in range(3):
        give_gradients(params, copies)
        ours.step()
        theirs.step()
        for optimizer in (ours, theirs):
            optimizer.zero_grad(set_to_none=to_none)
            optimizer.step()
        assert_follows(ours, theirs, params, copies)
        assert all((p.grad is None) == to_none for p in params)


def test_autocast(name):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)
    for _ in range(3):
        give_gradients(params, copies)
        with torch.autocast("cpu"):
            ours.step()
        theirs.step()
        assert_follows(ours, theirs, params, copies)


def test_grad_scaler(name):
    """It skips a step of which a gradient is infinite."""
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in range(2)]
    for step in range(4):
        give_gradients(params, copies)
        for scaler, optimizer, some in zip(scalers, (ours, theirs), (params, copies), strict=True):
            scaler.scale(torch.ones(()))
            if step == 1:
                some[1].grad[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        assert_follows(ours, theirs, params, copies)
    assert ours.state[params[0]]["step"] == 3


# Schedulers.

SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.3),
    "ExponentialLR": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 5),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, 0.5, total_steps=12, cycle_momentum=isinstance(o, torch.optim.RMSprop)
    ),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(
        o, 0.01, 0.3, step_size_up=3, cycle_momentum=isinstance(o, torch.optim.RMSprop)
    ),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.ConstantLR(o, 0.1, 3),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        milestones=[4],
    ),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
}


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers(name, make, lr):
    params = parameters(SHAPES)
    ours, _, copies = twins(name, params, lr=copy.deepcopy(lr))
    theirs = TORCH[name](copies, lr=copy.deepcopy(lr), foreach=False)
    schedulers = [make(optimizer) for optimizer in (ours, theirs)]
    for _ in range(10):
        follow(ours, theirs, params, copies, 1)
        for scheduler in schedulers:
            scheduler.step()
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]


def test_reduce_on_plateau(name):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params, lr=0.1)
    schedulers = [torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0) for o in (ours, theirs)]
    for _ in range(5):
        follow(ours, theirs, params, copies, 1)
        for scheduler in schedulers:
            scheduler.step(1.0)


def test_averaged_models(name):
    model = nn.Linear(5, 3)
    twin = copy.deepcopy(model)
    ours = OURS[name](model.parameters())
    theirs = TORCH[name](twin.parameters(), foreach=False)
    means = [torch.optim.swa_utils.AveragedModel(net) for net in (model, twin)]
    for _ in range(4):
        follow(ours, theirs, [*model.parameters()], [*twin.parameters()], 1)
        for mean, net in zip(means, (model, twin), strict=True):
            mean.update_parameters(net)
    for mine, other in zip(*(mean.parameters() for mean in means), strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-6)
