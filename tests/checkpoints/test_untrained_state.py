"""State before and at the first step, in copies and checkpoints: as if torch had made it."""

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from cases import OURS, TORCH, assert_follows, follow, give_gradients, parameters, twins
from torch import nn

from tritonopt.device import path

SHAPES = [(3, 5), (40,), (), (0,), (64,), (2, 3, 2, 2)]
EAGER = path(torch.device("cpu"))[0] == "eager"


def through_a_file(state, **kwargs):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, **kwargs)


# Copied before the first step, when torch has no state: it is made again, not taken as given.


def loaded(optimizer):
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    return optimizer


def cast(optimizer):
    for param in optimizer.param_groups[0]["params"]:
        param.data = param.data.double()


def reshaped(optimizer):
    for param in optimizer.param_groups[0]["params"]:
        param.data = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)


COPY = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
    "load": loaded,
}
CHANGE = {
    "lr": lambda o: o.param_groups[0].update(lr=0.3),
    "momentum": lambda o: o.param_groups[0].update(momentum=0.9, centered=True),
    "cast": cast,
    "reshaped": reshaped,
}


@pytest.mark.parametrize("change", CHANGE)
@pytest.mark.parametrize("way", COPY)
def test_copied_before_the_first_step(name, way, change):
    params = parameters([(3, 5), (), (40,)])
    optimizers = []
    for kind, options in ((OURS[name], {}), (TORCH[name], {"foreach": False})):
        optimizer = kind([{"params": copy.deepcopy(params), "lr": 0.02}], **options)
        optimizer.param_groups[0]["lr"] = 0.2
        optimizers.append(COPY[way](optimizer))
        CHANGE[change](optimizers[-1])
    params, copies = (optimizer.param_groups[0]["params"] for optimizer in optimizers)
    follow(*optimizers, params, copies, 3)


def untrained_head(kind, **options):
    """A checkpoint of two parameters of which one has never had a gradient."""
    params = parameters([(3,), (4,)])
    optimizer = kind(params, lr=0.01, **options)
    params[0].grad = torch.ones(3)
    optimizer.step()
    return through_a_file(optimizer.state_dict())


LOAD = {
    "another lr": ({"lr": 0.5}, (4,), torch.float32),
    "another dtype": ({"lr": 0.3}, (4,), torch.float64),
    "another shape": ({}, (6, 2), torch.float32),
    "no dense strides": ({}, (4, 2), torch.float32),
    "momentum": ({"momentum": 0.9, "centered": True}, (4,), torch.float32),
    "left to torch": ({"foreach": True}, (6,), torch.float64),
}


@pytest.mark.skipif(not EAGER, reason="bits of RMSprop: torch's square root is not rounded")
@pytest.mark.parametrize("case", LOAD)
def test_a_head_that_was_never_trained_is_as_without_state(name, case):
    """torch's checkpoint has none, so that any parameter may take the head's place."""
    options, size, dtype = LOAD[case]
    if name == "Rprop":
        options = {key: v for key, v in options.items() if key not in ("momentum", "centered")}
    optimizers, lists = [], []
    for kind in (OURS[name], TORCH[name]):
        head = nn.Parameter(torch.ones(size, dtype=dtype))
        if case == "no dense strides":
            head.data = torch.ones(8, 2)[::2]
        params = [*parameters([(3,)]), head]
        foreach = {"foreach": False} if kind is TORCH[name] else {}
        optimizer = kind(params, **{**foreach, **options})
        saved = untrained_head(kind)
        saved["param_groups"] = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(saved)
        optimizers.append(optimizer)
        lists.append(params)
    with torch.no_grad():
        lists[1][0].copy_(lists[0][0])
    for _ in range(3):
        give_gradients(*lists, missing={0})
        for optimizer in optimizers:
            optimizer.step()
        assert_follows(*optimizers, *lists)


@pytest.mark.parametrize("taken", ["group", "parameter"])
def test_an_untrained_parameter_that_was_taken_out(name, taken):
    params = parameters([(3,), (4,)])
    for kind in (OURS[name], TORCH[name]):
        optimizer = kind([{"params": [param]} for param in params])
        if taken == "group":
            optimizer.param_groups.pop()
        else:
            optimizer.param_groups[1]["params"] = [nn.Parameter(torch.ones(2))]
        params[0].grad = torch.ones(3)
        optimizer.step()
        state = optimizer.state_dict()
        assert state["state"][0]["step"] == 1 and params[1] not in optimizer.state


def test_step_sizes_that_were_reset_are_given():
    """Zeros in `step` and `prev` are somebody's: a checkpoint, too, leaves their step sizes."""
    (param,) = parameters([(3,)])
    optimizer = OURS["Rprop"]([param], lr=0.01)
    param.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.001
    optimizer.state[param]["step"].zero_()
    optimizer.state[param]["prev"].zero_()
    optimizer.state[param]["step_size"].fill_(0.01)
    assert optimizer.state_dict()["state"][0]["step_size"].eq(0.01).all()
    optimizer.step()
    assert torch.equal(optimizer.state[param]["step_size"], torch.full((3,), 0.01))


def test_two_that_load_the_same_before_the_first_step(name):
    """As torch's: each makes state of its own."""
    first, second = parameters([(9,)]), parameters([(9,)])
    ours = [OURS[name](some, lr=0.1) for some in (first, second)]
    theirs = TORCH[name]([nn.Parameter(second[0].detach().clone())], lr=0.1)
    ours[1].load_state_dict(ours[0].state_dict())
    give_gradients(first, second)
    ours[0].step()
    follow(ours[1], theirs, second, theirs.param_groups[0]["params"])


@pytest.mark.parametrize("step_options", [{}, {"foreach": True}], ids=str)
def test_state_in_shared_memory_is_not_made_again(name, step_options):
    """Another process, which unpickles it, updates the same state."""
    (param,) = parameters([(3,)])
    param.share_memory_()
    optimizer = OURS[name]([param], **step_options)
    for tensor in optimizer.state[param].values():
        tensor.share_memory_()
    there, other = pickle.loads(ForkingPickler.dumps((param, optimizer)))
    there.grad = torch.ones(3)
    other.step()
    for key, tensor in optimizer.state[param].items():
        torch.testing.assert_close(tensor, other.state[there][key], rtol=0, atol=0)
        assert tensor.any()


@pytest.mark.skipif(not EAGER, reason="bits of RMSprop: torch's square root is not rounded")
def test_half_way_between_two_optimizers(name):
    """Alternating every step, each loading what the other left."""
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)
    always = copy.deepcopy((theirs, copies))
    for step in range(6):
        one, other = (ours, theirs) if step % 2 else (theirs, ours)
        some, others = (params, copies) if step % 2 else (copies, params)
        give_gradients(some, always[1])
        one.step()
        always[0].step()
        assert_follows(one, always[0], some, always[1])
        state = copy.deepcopy(one.state_dict())
        state["param_groups"][0]["foreach"] = other.param_groups[0]["foreach"]
        other.load_state_dict(state)
        with torch.no_grad():
            for mine, param in zip(others, some, strict=True):
                mine.copy_(param)
