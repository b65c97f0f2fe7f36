"""State may be replaced, shared, cleared or lack keys between steps: what follows is torch's."""

import copy

import pytest
import torch
from cases import FEW_SHAPES, follow, give_gradients, parameters, twins

from tritonopt import slab

STATE = {
    "cleared": lambda optimizer: optimizer.state.clear(),
    "one deleted": lambda optimizer: optimizer.state.pop(optimizer.param_groups[0]["params"][1]),
    "one emptied": lambda optimizer: optimizer.state[
        optimizer.param_groups[0]["params"][2]
    ].clear(),
    "tensors replaced": lambda optimizer: optimizer.state.update(copied(optimizer.state)),
    "replaced but step": lambda optimizer: optimizer.state.update(
        {p: {**new, "step": optimizer.state[p]["step"]} for p, new in copied(optimizer.state)}
    ),
    "replaced in its dict": lambda optimizer: [
        optimizer.state[p].update(new) for p, new in copied(optimizer.state)
    ],
    "filled": lambda optimizer: [
        t.fill_(0.25) for _, s in list(optimizer.state.items()) for t in s.values() if t.dim()
    ],
    "data replaced": lambda optimizer: [
        setattr(t, "data", t.clone()) for s in optimizer.state.values() for t in s.values()
    ],
    "new dict": lambda optimizer: setattr(optimizer, "state", copy.copy(optimizer.state)),
}


def share(optimizer, *keys):
    first, *rest = optimizer.param_groups[0]["params"][1::3]  # of one shape
    for param in rest:
        optimizer.state[param].update({key: optimizer.state[first][key] for key in keys})


@pytest.mark.parametrize("count", [1, 2], ids=["step", "step and state"])
def test_state_that_parameters_share(name, count):
    """torch updates it once for each of them."""
    params = parameters([(3,), (40,), (), (7,), (40,), (5,), (9,), (40,)])
    ours, theirs, copies = twins(name, params, lr=0.1)
    follow(ours, theirs, params, copies, 2)
    for optimizer in (ours, theirs):
        share(optimizer, *("step", "square_avg" if name == "RMSprop" else "step_size")[:count])
    follow(ours, theirs, params, copies, 3)
    assert ours.state[params[1]]["step"] == 2 + 3 * 3


def copied(state):
    return [(p, {k: t.clone() for k, t in entry.items()}) for p, entry in state.items()]


@pytest.mark.parametrize("change", STATE.values(), ids=STATE)
def test_changed_state(name, change):
    params = parameters(FEW_SHAPES)
    ours, theirs, copies = twins(name, params, lr=0.1)
    follow(ours, theirs, params, copies, 3)
    for optimizer in (ours, theirs):
        change(optimizer)
    follow(ours, theirs, params, copies, 4)


def test_a_count_that_is_no_tensor_raises_as_in_torch(name):
    params = parameters(FEW_SHAPES)
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 1)
    before = [p.detach().clone() for p in params]
    for optimizer, some in ((ours, params), (theirs, copies)):
        for param in some:
            optimizer.state[param]["step"] = 3.0
        for _ in range(3):
            with pytest.raises(RuntimeError, match="list of singleton tensors"):
                optimizer.step()
    assert all(map(torch.equal, params, before))


def test_packing_that_fails_leaves_nothing_out(name, monkeypatch):
    """An error where loaded state is packed: the next step updates every parameter."""
    params = parameters(FEW_SHAPES)
    ours, theirs, copies = twins(name, params)
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    follow(ours, theirs, params, copies, 1)
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    give_gradients(params, copies)
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(slab, "allocate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ours.step()
    ours.step()
    theirs.step()
    follow(ours, theirs, params, copies, 3)


def test_a_cleared_entry_while_others_are_packed(name):
    """Of a parameter that is left to torch, which makes its state anew."""
    params = parameters([(3, 3), (5,)])
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 3)
    held = []
    for optimizer, (one, two) in ((ours, params), (theirs, copies)):
        for key, tensor in optimizer.state[one].items():
            if tensor.dim():
                optimizer.state[one][key] = tensor.t().contiguous().t()
                held.append(optimizer.state[one][key].detach())
        optimizer.state[two] = {key: t.clone() for key, t in optimizer.state[two].items()}
    follow(ours, theirs, params, copies, 1)
    for optimizer, (one, _) in ((ours, params), (theirs, copies)):
        optimizer.state[one].clear()
    follow(ours, theirs, params, copies, 3)


@pytest.mark.parametrize("key", ["step", "square_avg", "prev", "step_size"])
def test_a_key_is_missing(name, key):
    """torch looks at the state of no parameter without a gradient, and raises at one that has."""
    params = parameters(FEW_SHAPES)
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 2)
    if key not in ours.state[params[0]]:
        pytest.skip("is the other's")
    del ours.state[params[0]][key], theirs.state[copies[0]][key]
    give_gradients(params, copies, missing=[0])
    ours.step()
    theirs.step()
    assert ours.describe()
    give_gradients(params, copies)
    for optimizer in (ours, theirs):
        with pytest.raises(KeyError, match=key):
            optimizer.step()


def test_what_is_described_without_state(name):
    params = parameters(FEW_SHAPES)
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 2)
    for optimizer, some in ((ours, params), (theirs, copies)):
        del optimizer.state[some[0]]
        optimizer.state[some[1]].clear()
    assert "2 without state" in ours.describe() and len(ours.state) == len(params) - 1
    follow(ours, theirs, params, copies, 2)


def test_other_entries_of_state_survive(name):
    params = parameters(FEW_SHAPES)
    ours, theirs, copies = twins(name, params)
    for optimizer in (ours, theirs):
        optimizer.state["rounds"] = 3
        optimizer.state["warm"] = True
    follow(ours, theirs, params, copies, 2)
    for optimizer, some in ((ours, params), (theirs, copies)):
        optimizer.state[some[0]]["note"] = 7
        optimizer.state[some[0]]["ema"] = torch.ones(2)
    state = copy.deepcopy(ours.state_dict())
    assert state["state"]["rounds"] == 3 and state["state"][0]["note"] == 7
    ours.load_state_dict(state)
    give_gradients(params, copies)
    ours.step()
    assert ours.state["rounds"] == 3 and ours.state["warm"] is True
    assert ours.state[params[0]]["note"] == 7
    assert torch.equal(ours.state[params[0]]["ema"], torch.ones(2))


@pytest.mark.parametrize("before", [0, 3])
def test_step_sizes_that_are_given_stay(before):
    """A training that begins, or begins again, with other step sizes than lr."""
    params = parameters(FEW_SHAPES)
    ours, theirs, copies = twins("Rprop", params, lr=0.1)
    follow(ours, theirs, params, copies, before)
    for optimizer in (ours, theirs):
        for param in optimizer.param_groups[0]["params"]:
            optimizer.state[param] = {
                "step": torch.tensor(0.0),
                "prev": torch.zeros_like(param),
                "step_size": torch.full_like(param, 0.03),
            }
    follow(ours, theirs, params, copies, 3)
