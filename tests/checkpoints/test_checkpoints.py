"""Checkpoints load in both directions between torch.optim and tritonopt."""

import copy
import io
import pickle

import pytest
import torch
from cases import OURS, TORCH, follow, give_gradients, parameters, twins
from torch import nn

SHAPES = [(3, 5), (40,), (), (0,), (64,), (2, 3, 2, 2)]
OPTIONS = {
    "RMSprop": [{}, {"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True}],
    "Rprop": [{}, {"step_sizes": (0.004, 0.02)}],
}
ROWS = [pytest.param(n, o, id=f"{n}-{o}") for n, rows in OPTIONS.items() for o in rows]


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
