"""State that somebody else has made: distributed checkpoints' dummy step, other libraries."""

import copy
import io

import pytest
import torch
from cases import OURS, TORCH, assert_follows, follow, give_gradients, parameters, twins
from foreign_cases import TIMM, RMSpropTF
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

# The dummy step: `get_optimizer_state_dict` makes state by a step with lr 0 and gradients of 0.


def _models():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
    return model, copy.deepcopy(model)


def _groups(model, lrs):
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": weights, "lr": lrs[0]}, {"params": others, "lr": lrs[1]}]


@pytest.mark.parametrize("lrs", [(0.1, 0.1), (0.1, 0.02)], ids=str)
@pytest.mark.parametrize("reload", ["no", "into another", "into itself", "torch.save"])
def test_rprop_is_trainable_after_the_dummy_step(lrs, reload):
    """As torch's Rprop is that has seen no dummy step."""
    model, twin = _models()
    ours = OURS["Rprop"](_groups(model, lrs))
    theirs = TORCH["Rprop"](_groups(twin, lrs), foreach=False)
    before = [p.detach().clone() for p in model.parameters()]
    state = get_optimizer_state_dict(model, ours)
    assert all(map(torch.equal, model.parameters(), before))
    assert [group["lr"] for group in ours.param_groups] == list(lrs)
    assert len(state["state"]) == 3
    if reload == "torch.save":
        file = io.BytesIO()
        torch.save([model, ours, state], file)
        file.seek(0)
        model, ours, state = torch.load(file, weights_only=False)
    elif reload == "into another":
        model = copy.deepcopy(model)
        ours = OURS["Rprop"](_groups(model, lrs))
    if reload != "no":
        set_optimizer_state_dict(model, ours, copy.deepcopy(state))
    follow(ours, theirs, *(list(m.parameters()) for m in (model, twin)))


def test_rprop_after_the_dummy_step_and_a_new_lr():
    """A state starts from the lr in force when its parameter gets its first gradient."""
    model, twin = _models()
    ours = OURS["Rprop"](model.parameters(), lr=0.1)
    theirs = TORCH["Rprop"](twin.parameters(), lr=0.1, foreach=False)
    get_optimizer_state_dict(model, ours)
    params, copies = list(model.parameters()), list(twin.parameters())
    give_gradients(params, copies, missing={1})
    ours.step()
    theirs.step()
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["lr"] = 0.5
    follow(ours, theirs, params, copies)


def test_rmsprop_learns_nothing_from_the_dummy_step():
    """torch's averages the weight decay, and fills the momentum buffer with it."""
    options = {"momentum": 0.9, "centered": True, "weight_decay": 0.1}
    model, twin = _models()
    ours = OURS["RMSprop"](model.parameters(), **options)
    theirs = TORCH["RMSprop"](twin.parameters(), foreach=False, **options)
    entries = get_optimizer_state_dict(model, ours)["state"]
    assert all(
        [*entry] == ["step", "square_avg", "momentum_buffer", "grad_avg"]
        and not any(value.any() for value in entry.values())
        for entry in entries.values()
    )
    follow(ours, theirs, *(list(m.parameters()) for m in (model, twin)))


def test_a_step_of_nothing_is_no_dummy_step(name):
    """A parameter that has state is trained: an lr of 0 and gradients of 0 count."""
    params = parameters([(3,), (4,)])
    ours, theirs, copies = twins(name, params, lr=0.1)
    follow(ours, theirs, params, copies, steps=1)
    for param in [*params, *copies]:
        param.grad = torch.zeros_like(param)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
    assert_follows(ours, theirs, params, copies)
    follow(ours, theirs, params, copies)


# RMSprop as TensorFlow has it. Checkpoints know nothing of the options that say so.

FOREIGN = {
    "as timm's": (TIMM, {"momentum": 0.9}, {"lr_in_momentum": True}),
    "as timm's, no momentum": (TIMM, {}, {}),
    "as timm's, lr apart": ({**TIMM, "lr_in_momentum": False}, {"momentum": 0.9}, {}),
    "as Stable-Baselines3's": ({}, {}, {}),
    "as Stable-Baselines3's, momentum": ({}, {"momentum": 0.9}, {}),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_a_checkpoint_without_our_options_keeps_them(kind, trained):
    """Else it would train on by another rule, without a word."""
    extra, options, ours_only = FOREIGN[kind]
    params = parameters([(3, 4), (5,)])
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    tf = {"eps_in_sqrt": True, "initial_scale": 1.0, **ours_only}
    ours = OURS["RMSprop"](params, lr=1e-2, alpha=0.9, eps=1e-3, **options, **tf)
    theirs = RMSpropTF(copies, **options, extra=extra)
    for _ in range(3):
        give_gradients(params, copies)
        theirs.step()
        if trained:
            ours.step()
    with torch.no_grad():
        for param, twin in zip(params, copies, strict=True):
            param.copy_(twin)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert {key: ours.param_groups[0][key] for key in tf} == tf
    for _ in range(5):
        give_gradients(params, copies)
        ours.step()
        theirs.step()
        for param, twin in zip(params, copies, strict=True):
            torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)
            assert float(ours.state[param]["step"]) == theirs.state[twin]["step"]


def test_a_checkpoint_of_timm():
    timm = pytest.importorskip("timm.optim")
    params = parameters([(3, 4), (5,)])
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    options = {"lr": 1e-2, "alpha": 0.9, "eps": 1e-3, "momentum": 0.9}
    theirs = timm.RMSpropTF(copies, **options)
    tf = {"eps_in_sqrt": True, "initial_scale": 1.0, "lr_in_momentum": True}
    ours = OURS["RMSprop"](params, **options, **tf)
    for turn in range(6):
        give_gradients(params, copies)
        theirs.step()
        if turn == 2:
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
            with torch.no_grad():
                for param, twin in zip(params, copies, strict=True):
                    param.copy_(twin)
        elif turn > 2:
            ours.step()
            for param, twin in zip(params, copies, strict=True):
                torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)


BUILT = {
    "plain": {},
    "as timm's": {"eps_in_sqrt": True, "initial_scale": 1.0, "lr_in_momentum": True},
    "otherwise": {"nesterov": True, "bias_correction": True},
}


@pytest.mark.parametrize("built", BUILT)
@pytest.mark.parametrize("lr_in_momentum", [False, True], ids=["", "lr in momentum"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_checkpoint_of_timm_brings_its_rule(momentum, lr_in_momentum, built):
    """Whatever the optimizer was built with: its groups say whose they are."""
    (param,), (twin,) = parameters([(4,)]), parameters([(4,)])
    extra = {**TIMM, "lr_in_momentum": lr_in_momentum, "caution": False, "max_lr_snapshot": 0.01}
    theirs = RMSpropTF([twin], momentum=momentum, extra=extra)
    twin.grad = torch.ones_like(twin)
    theirs.step()
    ours = OURS["RMSprop"]([param], momentum=0.5, **BUILT[built])
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert not ours.param_groups[0].keys() & {*extra} - {"lr_in_momentum"}
    with torch.no_grad():
        param.copy_(twin)
    for _ in range(3):
        give_gradients([param], [twin])
        ours.step()
        theirs.step()
        torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_timm_with_what_ours_has_not_is_refused():
    extra = {**TIMM, "decoupled_decay": True, "corrected_weight_decay": True}
    theirs = RMSpropTF(parameters([(4,)]), extra=extra)
    with pytest.raises(ValueError, match="tritonopt has no corrected_weight_decay"):
        OURS["RMSprop"](parameters([(4,)])).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("way", ["torch's", "ours without options"])
def test_options_of_the_optimizer_win_over_a_checkpoint_without(way):
    """Group by group: each has values of its own."""
    params = parameters([(3,), (4,)])
    groups = [{"params": params[:1], "eps_in_sqrt": True}, {"params": params[1:]}]
    ours = OURS["RMSprop"](groups)
    copies = [{"params": [nn.Parameter(p.detach().clone())]} for p in params]
    other = (TORCH if way == "torch's" else OURS)["RMSprop"](copies)
    for group in other.param_groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    other.step()
    ours.load_state_dict(other.state_dict())
    assert [group.get("eps_in_sqrt", False) for group in ours.param_groups] == [True, False]
    saved = copy.deepcopy(ours.state_dict())
    again = OURS["RMSprop"]([{"params": [p]} for p in params], eps_in_sqrt=False)
    again.load_state_dict(saved)
    assert [group.get("eps_in_sqrt", False) for group in again.param_groups] == [True, False]


@pytest.mark.parametrize("variant", ["irprop-", "rprop+"])
def test_a_variant_stays(variant):
    params = parameters([(3,), (4,)])
    ours, theirs, copies = twins("Rprop", params)
    follow(ours, theirs, params, copies, steps=1)
    other = OURS["Rprop"](params, variant=variant)
    other.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert other.param_groups[0].get("variant", "irprop-") == variant
