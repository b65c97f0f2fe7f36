"""Whether anything was replaced since the last step, which decides what is looked at again."""

import contextlib
from collections import OrderedDict, UserDict

import pytest
import torch
from cases import FEW_SHAPES, follow, parameters, twins
from torch import nn

from tritonopt.verify import _Differ, same


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


def test_only_comparisons_are_answered():
    """A signal's handler or a finalizer may run in between."""
    with _Differ():
        assert torch.equal(torch.ones(3).add_(1), torch.full((3,), 2.0))
        assert [torch.ones(1)] != [torch.ones(1)]


def test_what_a_signal_raises_is_not_lost():
    class Timeout(Exception):
        pass

    class Slow:
        def __eq__(self, other):
            raise Timeout

    with pytest.raises(Timeout):
        same([Slow()], [Slow()])


@pytest.mark.parametrize("then", [dict.clear, lambda entry: entry.update(step=torch.zeros(()))])
@pytest.mark.parametrize("count", [1, 3])
def test_entries_that_were_replaced_by_equal_ones(name, then, count):
    params = parameters([(5,), (7, 3), (4,)][:count])
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 3)
    for optimizer in (ours, theirs):
        state = optimizer.state_dict()
        optimizer.load_state_dict(state)
        optimizer.before = state["state"].values()
    follow(ours, theirs, params, copies, 1)
    for optimizer in (ours, theirs):
        for entry in optimizer.before:
            then(entry)
    follow(ours, theirs, params, copies, 3)
    assert ours.state[params[0]]["step"] == 7


@pytest.mark.parametrize("kind", [OrderedDict, UserDict])
def test_entries_of_other_types(name, kind):
    params = parameters(FEW_SHAPES)
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 2)
    for optimizer in (ours, theirs):
        for param in optimizer.param_groups[0]["params"]:
            optimizer.state[param] = kind(optimizer.state[param])
    follow(ours, theirs, params, copies, 2)
    for value in (3.0, 4.0):
        for optimizer in (ours, theirs):
            for entry in optimizer.state.values():
                entry.update({key: torch.full_like(entry[key], value) for key in entry})
        follow(ours, theirs, params, copies, 4)


class Own(torch.Tensor):
    """Compares values."""

    __hash__ = torch.Tensor.__hash__

    def __eq__(self, other):
        return self.tolist() == other.tolist()


def test_tensors_that_compare_values(name):
    params = parameters(FEW_SHAPES)
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 2)
    for _ in range(3):
        for optimizer in (ours, theirs):
            for entry in optimizer.state.values():
                entry.update({key: t.clone().as_subclass(Own) for key, t in entry.items()})
        follow(ours, theirs, params, copies, 1)


def test_an_object_that_has_a_copy_of_the_dict(name):
    """Its layouts are the same ones."""
    params = parameters(FEW_SHAPES)
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 3)
    wrapper = object.__new__(type(ours))
    wrapper.__dict__ = dict(ours.__dict__)
    follow(wrapper, theirs, params, copies, 1)
    kept = [[dict(optimizer.state[p]) for p in some] for optimizer, some in
            ((ours, params), (theirs, copies))]  # fmt: skip
    for optimizer in (ours, theirs):
        for entry in optimizer.state.values():
            entry.update({key: tensor.clone() for key, tensor in entry.items()})
    follow(ours, theirs, params, copies, 3)
    for optimizer, some, entries in zip((ours, theirs), (params, copies), kept, strict=True):
        for param, entry in zip(some, entries, strict=True):
            optimizer.state[param].update(entry)
    follow(wrapper, theirs, params, copies, 3)
