"""State is torch's: its keys, their order, and what is found there already."""

import copy

import pytest
import torch
from cases import (
    OURS,
    follow,
    give_gradients,
    parameters,
    twins,
)

SHAPES = [(3, 5), (40,), (), (64,), (7,)]


def test_no_groups_at_all(name):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params, lr=0.1)
    follow(ours, theirs, params, copies, steps=1)
    groups = [list(optimizer.param_groups) for optimizer in (ours, theirs)]
    for optimizer in (ours, theirs):
        optimizer.param_groups.clear()
        optimizer.step()
    for optimizer, some in zip((ours, theirs), groups, strict=True):
        optimizer.param_groups.extend(some)
    follow(ours, theirs, params, copies)


def test_a_dict_that_is_there_already_is_filled(name):
    """Somebody has looked into `state`, which makes an empty entry."""
    params = parameters(SHAPES)
    optimizer = OURS[name](params)
    entries = [optimizer.state[param] for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    for param, entry in zip(params, entries, strict=True):
        assert optimizer.state[param] is entry and float(entry["step"]) == 1


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "centered": True}], ids=str)
def test_keys_have_torchs_order(name, options):
    if name == "Rprop" and options:
        options = {"maximize": True}
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params, **options)
    give_gradients(params, copies)
    ours.step()
    theirs.step()
    for param, twin in zip(params, copies, strict=True):
        assert [*ours.state[param]] == [*theirs.state[twin]]


@pytest.mark.parametrize(
    "step",
    [
        torch.tensor(5),
        torch.tensor([5.0]),
        torch.tensor(5.0, dtype=torch.float64),
        torch.tensor(5.0, dtype=torch.float16),
    ],
    ids=["int64", "of one dimension", "float64", "float16"],
)
@pytest.mark.parametrize("count", [1, 5])
def test_counts_of_other_libraries(name, step, count):
    params = parameters([(n,) for n in range(3, 3 + count)])
    ours, theirs, copies = twins(name, params, lr=0.1)
    follow(ours, theirs, params, copies, steps=1)
    for optimizer in (ours, theirs):
        state = copy.deepcopy(optimizer.state_dict())
        for entry in state["state"].values():
            entry["step"] = step.clone()
        optimizer.load_state_dict(state)
    follow(ours, theirs, params, copies, steps=2)
    for param, twin in zip(params, copies, strict=True):
        assert ours.state[param]["step"].dtype == theirs.state[twin]["step"].dtype
