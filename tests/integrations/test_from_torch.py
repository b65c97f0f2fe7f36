"""`from_torch`: the optimizer becomes ours where it stands, and trains on as torch's would."""

import copy
import functools
import subprocess
import sys
import warnings

import pytest
import torch
from cases import OURS, TORCH, assert_follows, give_gradients, parameters
from foreign_cases import TIMM, RMSpropTF, StableBaselines3, Timm, timm_rmsprop_tf

import tritonopt


def train(pairs, schedulers, steps):
    (ours, params), (theirs, copies) = pairs
    for _ in range(steps):
        give_gradients(params, copies)
        ours.step()
        theirs.step()
        for scheduler in schedulers:
            scheduler.step()


def stock(name, **kwargs):
    """Two of torch's optimizers with equal parameters, two groups each."""
    params = parameters()
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    return [
        (TORCH[name]([{"params": ps[:4]}, {"params": ps[4:], "lr": 0.003}], **kwargs), ps)
        for ps in (params, copies)
    ]


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("name", OURS)
def test_training_goes_on(name, before):
    pairs = stock(name)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2) for o, _ in pairs]
    train(pairs, schedulers, before)
    ours, params = pairs[0]
    converted = tritonopt.from_torch(ours)
    assert converted is ours and type(ours) is OURS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a scheduler that takes our step for none
        train(pairs, schedulers, 5)
    theirs, copies = pairs[1]
    assert_follows(ours, theirs, params, copies)
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()
    assert "torch" not in ours.describe().splitlines()[1]


@pytest.mark.parametrize("name", OURS)
def test_checkpoints_keep_their_format(name):
    pairs = stock(name)
    train(pairs, [], 2)
    ours, theirs = (optimizer for optimizer, _ in pairs)
    saved = tritonopt.from_torch(ours).state_dict()
    assert saved["param_groups"] == theirs.state_dict()["param_groups"]
    assert saved["state"].keys() == theirs.state_dict()["state"].keys()
    theirs.load_state_dict(copy.deepcopy(saved))
    train(pairs, [], 3)
    assert_follows(ours, theirs, pairs[0][1], pairs[1][1])


def test_hooks_are_kept():
    optimizer, _ = stock("RMSprop")[0]
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append("step"))
    tritonopt.from_torch(optimizer).step()
    assert called == ["step"]


def test_ours_is_returned_as_it_is():
    optimizer = tritonopt.Rprop(parameters())
    assert tritonopt.from_torch(optimizer) is optimizer


class Own(torch.optim.RMSprop):
    pass


@pytest.mark.parametrize("kind", [torch.optim.SGD, Own])
def test_other_classes_are_refused(kind):
    with pytest.raises(TypeError, match="from_torch takes torch's RMSprop and Rprop, timm"):
        tritonopt.from_torch(kind(parameters()))


def test_a_replaced_step_is_refused():
    optimizer = torch.optim.RMSprop(parameters())
    optimizer.step = lambda: None
    with pytest.raises(TypeError, match="step was replaced"):
        tritonopt.from_torch(optimizer)
    assert type(optimizer) is torch.optim.RMSprop


HOOKED = """
import torch, tritonopt
param = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.RMSprop([param])
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
calls = []
optimizer.register_step_pre_hook(lambda *_: calls.append(1))
tritonopt.from_torch(optimizer)
param.grad = torch.ones(2)
optimizer.step()
assert calls == [1]
"""


@pytest.mark.slow
def test_hooks_are_called_where_no_optimizer_of_ours_was_built():
    subprocess.run([sys.executable, "-c", HOOKED], check=True)


def test_a_wrapper_over_a_schedulers_is_refused(name):
    optimizer = getattr(torch.optim, name)([torch.nn.Parameter(torch.ones(2))])
    torch.optim.lr_scheduler.StepLR(optimizer, 10)
    inner = optimizer.step
    optimizer.step = functools.wraps(inner)(lambda *args: inner(*args))
    with pytest.raises(TypeError, match="step was replaced"):
        tritonopt.from_torch(optimizer)


@pytest.mark.parametrize("before", ["scheduler first", "converted first"])
def test_a_scheduler_warns_before_the_first_step_alone(name, before):
    params = parameters()
    optimizer = TORCH[name](params)
    if before == "converted first":
        tritonopt.from_torch(optimizer)
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 2) for _ in range(2)]
    tritonopt.from_torch(optimizer)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        schedulers[0].step()
    give_gradients(params, params)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers[1].step()


# Those of other libraries.

OTHERS = {
    "timm": (Timm, {"extra": TIMM}, {"lr_in_momentum": True}),
    "timm, momentum": (Timm, {"extra": TIMM, "momentum": 0.9}, {"lr_in_momentum": True}),
    "timm, foreach": (Timm, {"extra": {**TIMM, "foreach": True}}, {}),
    "Stable-Baselines3": (StableBaselines3, {}, {}),
    "Stable-Baselines3, momentum": (StableBaselines3, {"momentum": 0.9}, {}),
}


def assert_trains_on(make, options, fitting, before):
    """Converts one of two equal optimizers after some steps, and gives both another group."""
    params = parameters([(3, 4), (5,), (2, 2), (6,)])
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours, theirs = (
        make([{"params": ps[:2]}, {"params": ps[2:3], "lr": 0.003}], **options)
        for ps in (params, copies)
    )

    def train(steps):
        for _ in range(steps):
            give_gradients(params, copies)
            ours.step()
            theirs.step()
            for param, twin in zip(params, copies, strict=True):
                torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)

    scheduler = torch.optim.lr_scheduler.StepLR(ours, 100)
    train(before)
    assert tritonopt.from_torch(ours) is ours and type(ours) is tritonopt.RMSprop
    assert scheduler.optimizer is ours
    for optimizer, ps in ((ours, params), (theirs, copies)):
        optimizer.add_param_group({"params": ps[3:]})
    train(4)
    for group in ours.param_groups:
        assert {key: group[key] for key in fitting} == fitting
    assert "torch" not in ours.describe().splitlines()[1]
    for param, twin in zip(params, copies, strict=True):
        entry, other = ours.state[param], theirs.state[twin]
        assert entry.keys() == other.keys() and float(entry["step"]) == float(other["step"])
        for key in entry.keys() - {"step"}:
            torch.testing.assert_close(entry[key], other[key], rtol=1e-5, atol=1e-6)
    copy.deepcopy(ours).load_state_dict(ours.state_dict())


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("kind", OTHERS)
def test_others_train_on(kind, before):
    make, options, fitting = OTHERS[kind]
    assert_trains_on(make, options, {"eps_in_sqrt": True, "initial_scale": 1.0, **fitting}, before)


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize(
    "options, fitting",
    [
        ({}, {"lr_in_momentum": True}),
        ({"momentum": 0.9}, {"lr_in_momentum": True}),
        ({"momentum": 0.9, "lr_in_momentum": False}, {}),
        ({"momentum": 0.9, "caution": True}, {"lr_in_momentum": True, "cautious": True}),
        ({"momentum": 0.9, "caution": True, "weight_decay": 0.1, "lr_in_momentum": False}, {}),
        ({"centered": True, "eps": 1e-3}, {}),
        ({"weight_decay": 0.1, "decoupled_decay": True}, {"decoupled_weight_decay": True}),
    ],
    ids=["plain", "momentum", "lr apart", "caution", "caution, lr apart", "centered", "decoupled"],
)
def test_timms_own(options, fitting, before, monkeypatch):
    assert_trains_on(timm_rmsprop_tf(monkeypatch), options, fitting, before)


def test_momentum_that_comes_and_goes(monkeypatch):
    """As schedules make it: at 0 or without, timm's option says what becomes of it later."""
    make = timm_rmsprop_tf(monkeypatch)
    params = parameters([(3, 4), (5,)])
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours, theirs = tritonopt.from_torch(make(params, lr=0.05)), make(copies, lr=0.05)
    for step, momentum in enumerate((0.5, 0.9, 0.0, 0.0, 0.7)):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0].update(momentum=momentum, lr=0.05 / (step + 1))
        give_gradients(params, copies)
        ours.step()
        theirs.step()
        for param, twin in zip(params, copies, strict=True):
            torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("option", ["decoupled_decay", "caution"])
def test_a_later_group_with_an_option_of_timm_is_refused(option):
    ours = tritonopt.from_torch(Timm(parameters([(3,)]), extra=TIMM))
    with pytest.raises(ValueError, match=f"{option} is timm's"):
        ours.add_param_group({"params": parameters([(3,)]), option: True})


def test_what_an_optimizer_ignored_stays_ignored():
    (param,) = parameters([(3,)])
    group = {"params": [param], "momentum": 0.9, "nesterov": True, "initial_scale": 3.0}
    assert "nesterov" not in tritonopt.from_torch(torch.optim.RMSprop([group])).describe()
    theirs = StableBaselines3([param])
    ascending = torch.optim.RMSprop([param], maximize=True, foreach=False)
    theirs.load_state_dict(ascending.state_dict())
    group = tritonopt.from_torch(theirs).param_groups[0]
    assert group["maximize"] is False and group["foreach"] is None


WRONG = {
    "mode": (lambda ps: Timm(ps, extra=TIMM), {"compile": {"mode": "no such"}}),
    "no dict": (lambda ps: Timm(ps, extra=TIMM), {"compile": 5}),
    "timm's value": (lambda ps: Timm([{"params": ps, "eps": "x"}], extra=TIMM), {}),
    "value": (lambda ps: torch.optim.RMSprop([{"params": ps, "weight_decay": None}]), {}),
    "not of a group": (lambda ps: torch.optim.Rprop([{"params": ps, "max_grad_norm": 1}]), {}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_converted_stays_what_it_was(kind):
    make, options = WRONG[kind]
    optimizer = make(parameters([(3,)]))

    def look():
        return type(optimizer), optimizer.state_dict(), optimizer.defaults, [*vars(optimizer)]

    before = copy.deepcopy(look())
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        tritonopt.from_torch(optimizer, **options)
    assert look() == before


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"centered": True, "eps": 1e-3}])
def test_stable_baselines3s_own(options):
    name = "stable_baselines3.common.sb2_compat.rmsprop_tf_like"
    assert_trains_on(pytest.importorskip(name).RMSpropTFLike, options, {"eps_in_sqrt": True}, 3)


def test_an_option_of_timm_that_ours_has_not_is_refused():
    option = "corrected_weight_decay"
    params = parameters([(3,), (4,)])
    groups = [{"params": params[:1]}, {"params": params[1:], option: True, "decoupled_decay": True}]
    optimizer = Timm(groups, extra={**TIMM, option: False})
    before = copy.deepcopy(optimizer.state_dict()), dict(optimizer.defaults)
    with pytest.raises(ValueError, match=f"tritonopt has no {option}"):
        tritonopt.from_torch(optimizer)
    assert type(optimizer) is Timm and before == (optimizer.state_dict(), optimizer.defaults)


def test_a_subclass_of_theirs_is_refused():
    with pytest.raises(TypeError, match="no subclass"):
        tritonopt.from_torch(RMSpropTF(parameters()))


def test_theirs_is_compiled():
    optimizer = Timm(parameters(), extra=TIMM)
    tritonopt.from_torch(optimizer, compile={"backend": "aot_eager"})
    assert "compiled" in optimizer.describe()
