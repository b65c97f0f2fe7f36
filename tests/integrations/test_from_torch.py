"""`from_torch`: the optimizer becomes ours where it stands, and trains on as torch's would."""

import copy
import functools
import subprocess
import sys
import warnings

import pytest
import torch
from cases import OURS, TORCH, assert_follows, give_gradients, parameters

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
    with pytest.raises(TypeError, match="from_torch takes torch.optim.RMSprop or"):
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
