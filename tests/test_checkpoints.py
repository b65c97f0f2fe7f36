"""Checkpoints, in both directions between torch.optim and tritonopt."""

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
OPTIONS = {
    "RMSprop": [{}, {"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True}],
    "Rprop": [{}, {"step_sizes": (0.004, 0.02)}],
}
ROWS = [pytest.param(n, o, id=f"{n}-{o}") for n, rows in OPTIONS.items() for o in rows]
EAGER = path(torch.device("cpu"))[0] == "eager"


def through_a_file(state, **kwargs):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, **kwargs)


def tensors(optimizer):
    return [t for p in optimizer.param_groups[0]["params"] for t in optimizer.state[p].values()]


WAYS = {
    "torch to ours": (TORCH, OURS),
    "ours to torch": (OURS, TORCH),
    "ours to ours": (OURS, OURS),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name, options", ROWS)
def test_resuming(name, options, way, steps, dtype):
    """What is resumed takes the same 20 steps as torch's, which was never interrupted."""
    source, target = way
    params = parameters(SHAPES, dtype)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    first = source[name](params, lr=0.1, **options)
    theirs = TORCH[name](copies, lr=0.1, foreach=None, **options)
    follow(first, theirs, params, copies, steps)
    state = through_a_file(first.state_dict(), weights_only=True)
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    second = target[name](resumed, lr=0.7)
    second.load_state_dict(state)
    follow(second, theirs, resumed, copies, 20)


@pytest.mark.parametrize("name, options", ROWS)
def test_a_checkpoint_looks_like_torchs(name, options, device):
    params = parameters(SHAPES, device=device)
    ours, theirs, copies = twins(name, params, **options)
    follow(ours, theirs, params, copies, 2)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    group, torchs = mine["param_groups"][0], other["param_groups"][0]
    assert [key for key in group if key in torchs] == list(torchs)
    assert {key: group[key] for key in torchs} == {**torchs, "foreach": None}
    for index, state in other["state"].items():
        assert list(mine["state"][index]) == list(state)
        for key, value in state.items():
            tensor = mine["state"][index][key]
            assert type(tensor) is torch.Tensor
            assert tensor.shape == value.shape and tensor.dtype == value.dtype, key
            assert tensor.stride() == value.stride() and tensor.device == value.device, key


def test_state_dict_follows_as_torchs_does(name):
    """It holds the tensors themselves, as torch's: not copies."""
    params = parameters(SHAPES)
    ours = OURS[name](params)
    give_gradients(params, params)
    ours.step()
    state = ours.state_dict()["state"]
    give_gradients(params, params)
    ours.step()
    assert state[0]["step"] == 2


def test_the_callers_state_dict_stays_usable(name):
    """Two models load one checkpoint in turn; torch copies nothing on load either."""
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 2)
    state = copy.deepcopy(theirs.state_dict())
    for _ in range(2):
        ours.load_state_dict(copy.deepcopy(state))
        theirs.load_state_dict(copy.deepcopy(state))
        follow(ours, theirs, params, copies, 2)


def test_called_by_keyword(name):
    params = parameters(SHAPES)
    ours = OURS[name](params)
    give_gradients(params, params)
    ours.step()
    other = OURS[name](parameters(SHAPES))
    other.load_state_dict(state_dict=copy.deepcopy(ours.state_dict()))
    assert all(map(torch.equal, tensors(other), tensors(ours)))


# Old checkpoints.


def number_steps(state):
    for entry in state["state"].values():
        entry["step"] = int(entry["step"])


def lack(*keys):
    def drop(state):
        for group in state["param_groups"]:
            for key in keys:
                group.pop(key, None)

    return drop


OLD = {
    "step is a number": number_steps,
    "no maximize": lack("maximize"),
    "no foreach": lack("foreach"),
    "no new options": lack("foreach", "maximize", "differentiable", "capturable"),
    "no momentum, no centered": lack("momentum", "centered"),
}


@pytest.mark.parametrize("age", OLD.values(), ids=OLD)
def test_old_checkpoints(name, age):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 3)
    for optimizer in (ours, theirs):
        state = copy.deepcopy(optimizer.state_dict())
        age(state)
        optimizer.load_state_dict(state)
    follow(ours, theirs, params, copies, 4)
    assert isinstance(ours.state[params[0]]["step"], torch.Tensor)


def test_a_pickle_from_before_the_new_options(name):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 2)
    state = ours.__getstate__()
    for group in state["param_groups"]:
        for key in ("foreach", "maximize", "differentiable", "capturable"):
            group.pop(key)
    ours.__setstate__(state)
    follow(ours, theirs, params, copies, 3)


def test_what_is_pickled(name):
    params = parameters(SHAPES)
    ours = OURS[name](params)
    give_gradients(params, params)
    ours.step()
    assert set(ours.__getstate__()) == {"defaults", "state", "param_groups"}
    copied = pickle.loads(pickle.dumps(ours))
    assert all(map(torch.equal, tensors(copied), tensors(ours)))
    assert copied.defaults == ours.defaults


# Names.


def test_named_parameters(name):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    twin = copy.deepcopy(model)
    ours = OURS[name](model.named_parameters())
    theirs = TORCH[name](twin.named_parameters(), foreach=False)
    follow(ours, theirs, [*model.parameters()], [*twin.parameters()], 3)
    state = through_a_file(ours.state_dict(), weights_only=True)
    assert state["param_groups"][0]["param_names"] == [n for n, _ in model.named_parameters()]
    other = TORCH[name](twin.named_parameters())
    other.load_state_dict(copy.deepcopy(state))
    state["param_groups"][0]["param_names"] = list("abcd")
    ours.load_state_dict(state)
    assert ours.param_groups[0]["param_names"] == list("abcd")
    follow(ours, other, [*model.parameters()], [*twin.parameters()], 3)


# Into a model that differs.

INTO = {
    "double": lambda p: p.double(),
    "channels_last": lambda p: p.to(memory_format=torch.channels_last) if p.dim() == 4 else p,
    "transposed": lambda p: p.transpose(0, -1).contiguous().transpose(0, -1) if p.dim() else p,
    "a larger storage": lambda p: torch.stack([p, p]).unbind()[1],
}


@pytest.mark.parametrize("change", INTO.values(), ids=INTO)
def test_into_another_model(name, change):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 3)
    mine, other = (copy.deepcopy(o.state_dict()) for o in (ours, theirs))
    params = [nn.Parameter(change(p.detach().clone())) for p in params]
    ours, theirs, copies = twins(name, params)
    ours.load_state_dict(mine)
    theirs.load_state_dict(other)
    follow(ours, theirs, params, copies, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_into_half_precision(name, dtype):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params, lr=0.1)
    follow(ours, theirs, params, copies, 3)
    state = copy.deepcopy(theirs.state_dict())
    state["param_groups"][0]["foreach"] = None
    params = [nn.Parameter(p.detach().to(dtype)) for p in params]
    ours, theirs, copies = twins(name, params)
    ours.load_state_dict(copy.deepcopy(state))
    theirs.load_state_dict(copy.deepcopy(state))
    for param, other in zip(params, copies, strict=True):
        for key, value in theirs.state[other].items():
            assert ours.state[param][key].dtype == value.dtype
    give_gradients(params, copies)
    ours.step()
    theirs.step()
    for param, other in zip(params, copies, strict=True):
        torch.testing.assert_close(param, other, rtol=0.02, atol=0.02)


WRONG = {
    "groups": lambda state: state["param_groups"].append(state["param_groups"][0]),
    "params": lambda state: state["param_groups"][0]["params"].pop(),
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
def test_a_wrong_checkpoint_raises_as_in_torch_and_changes_nothing(name, spoil):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 2)
    texts = []
    for optimizer in (ours, theirs):
        state = copy.deepcopy(optimizer.state_dict())
        spoil(state)
        with pytest.raises(ValueError) as error:
            optimizer.load_state_dict(state)
        texts.append(str(error.value))
    assert texts[0] == texts[1]
    follow(ours, theirs, params, copies, 2)


def test_state_of_other_parameters_survives(name):
    """torch keeps what no parameter has."""
    params = parameters(SHAPES)
    ours = OURS[name](params)
    state = copy.deepcopy(ours.state_dict())
    state["state"][99] = {"kept": 1}
    ours.load_state_dict(state)
    give_gradients(params, params)
    ours.step()
    assert ours.state[99] == {"kept": 1}


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
