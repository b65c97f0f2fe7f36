"""Whether anything was replaced since the last step, which decides what is looked at again."""

import contextlib

import pytest
import torch
from cases import FEW_SHAPES, follow, parameters, twins
from torch import nn

from tritonopt.verify import same


class Unequal:
    def __eq__(self, other):
        raise ValueError("ambiguous")


MODES = [contextlib.nullcontext, torch._C.DisableTorchFunction, lambda: torch.device("meta")]


@pytest.mark.parametrize("mode", MODES, ids=["plain", "torch functions disabled", "device"])
def test_same_is_of_objects_not_of_values(mode):
    one, two = torch.ones(()), nn.Parameter(torch.ones(3))
    found = [one], [{"step": one, "prev": two}, 7], [[two, one]]
    with mode():
        assert same(found, ([one], [{"step": one, "prev": two}, 7], [[two, one]])) or (
            mode is torch._C.DisableTorchFunction
        )
        assert not same(found, ([one.clone()], *found[1:]))
        assert not same(found, (found[0], [{"step": one.clone(), "prev": two}, 7], found[2]))
        assert not same(found, (found[0], [{"step": one, "prev": two, "more": 1}, 7], found[2]))
        assert not same(found, (found[0], [{"step": one, "prev": nn.Parameter(two)}, 7], found[2]))
        assert not same(found, (*found[:2], [[one, two]]))
        assert not same(found, None)
        assert not same([Unequal()], [Unequal()])
        assert bool(one == one.clone())  # tensors are compared as ever


@pytest.mark.parametrize("mode", MODES[:2], ids=["plain", "torch functions disabled"])
def test_equal_objects_that_are_others(name, mode):
    """Entries, state and parameters of one element, replaced one after the other."""
    params = parameters([(), (1,), *FEW_SHAPES])
    ours, theirs, copies = twins(name, params, lr=0.1)

    def replace_entries(optimizer, params):
        optimizer.state.update({p: dict(optimizer.state[p]) for p in params})

    def replace_counts(optimizer, params):
        for param in params:
            optimizer.state[param]["step"] = optimizer.state[param]["step"].clone()

    def replace_state(optimizer, params):
        for param in params:
            entry = optimizer.state[param]
            entry.update({key: tensor.clone() for key, tensor in entry.items()})

    def replace_parameters(optimizer, params):
        group = optimizer.param_groups[0]["params"]
        for index in (0, 1):
            params[index] = group[index] = nn.Parameter(params[index].detach().clone())

    with mode():
        follow(ours, theirs, params, copies, 2)
        for replace in (replace_entries, replace_counts, replace_state, replace_parameters):
            replace(ours, params)
            replace(theirs, copies)
            follow(ours, theirs, params, copies, 2)
    assert ours.state[params[2]]["step"] == 10


def test_state_of_others_that_cannot_be_compared(name):
    params = parameters(FEW_SHAPES)
    ours, theirs, copies = twins(name, params)
    for note in (Unequal(), Unequal()):
        ours.state["note"] = ours.state[params[0]]["note"] = note
        follow(ours, theirs, params, copies, 2)
