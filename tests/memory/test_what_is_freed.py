"""Which memory an optimizer keeps, and which it lets go."""

import gc
import weakref

import pytest
import torch
from cases import (
    OURS,
    follow,
    parameters,
    twins,
)
from torch import Tensor, nn

SHAPES = [(3, 5), (40,), (), (64,), (7,)]


def test_no_gradient_is_kept(name):
    params = parameters([(5,)] * 3)
    ours = OURS[name](params, lr=0.1, max_grad_norm=1.0)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        ours.step()
    kept = [weakref.ref(param.grad) for param in params]
    ours.zero_grad()
    assert not any(gradient() is not None for gradient in kept)


def _bytes_alive():
    """Of all tensors; a slab and its pieces are the same memory."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
    storages = [t.untyped_storage() for t in tensors]
    total = end = 0
    for start, stop in sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages):
        total += max(stop - max(start, end), 0)
        end = max(stop, end)
    return total


@pytest.mark.slow
@pytest.mark.parametrize("how", ["groups", "optimizers"])
def test_scratch_does_not_add_up(name, how):
    def kept(count):
        before = _bytes_alive()
        params = [nn.Parameter(torch.ones(2**15)) for _ in range(count)]
        for param in params:
            param.grad = torch.ones_like(param)
        if how == "groups":
            groups = [{"params": [p], "maximize": i % 2 == 0} for i, p in enumerate(params)]
            optimizers = [OURS[name](groups)]
        else:
            optimizers = [OURS[name]([param]) for param in params]
        for optimizer in optimizers:
            optimizer.step()
        tensors = [t for o in optimizers for e in o.state.values() for t in e.values()]
        own = sum(t.numel() * t.itemsize for t in [*params, *params, *tensors])
        return _bytes_alive() - before - own

    kept(2)  # scratch and constants of the process are there from now on
    assert kept(12) < 2**15 * 4


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("how", ["params replaced", "group removed", "group's list cleared"])
def test_parameters_taken_out_are_freed(name, how, steps):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = OURS[name](model.parameters(), lr=0.1)
    new = parameters([(3,), (5,)])
    optimizer.add_param_group({"params": new, "maximize": True})
    for _ in range(steps):
        for param in [*model.parameters(), *new]:
            param.grad = torch.ones_like(param)
        optimizer.step()
    old = [weakref.ref(param) for param in model.parameters()]
    old += [weakref.ref(t) for e in optimizer.state.values() for t in e.values()]
    optimizer.state.clear()
    if how == "params replaced":
        optimizer.param_groups[0]["params"] = parameters([(2,)])
    elif how == "group removed":
        del optimizer.param_groups[0]
    else:
        optimizer.param_groups[0]["params"].clear()
    del model
    for param in new:
        param.grad = torch.ones_like(param)
    optimizer.step()
    gc.collect()
    assert not [ref for ref in old if ref() is not None]


def test_a_storage_that_cannot_be_resized_can_be_left(name):
    """What lies in a slab has no memory of its own to give back: another tensor has."""
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params, lr=0.1)
    follow(ours, theirs, params, copies, steps=2)
    for tensor in (params[0], *ours.state[params[0]].values()):
        tensor.data = tensor.data.clone()
        kept, storage = tensor.detach().clone(), tensor.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        with torch.no_grad():
            tensor.copy_(kept)
    follow(ours, theirs, params, copies)


def test_a_lone_parameter_can_be_freed_and_brought_back(name):
    param = nn.Parameter(torch.ones(8))
    ours, theirs, copies = twins(name, [param], lr=0.1)
    for _ in range(3):
        kept, storage = param.detach().clone(), param.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        with torch.no_grad():
            param.copy_(kept)
        follow(ours, theirs, [param], copies, steps=1)


def test_what_was_replaced_is_left_alone(name):
    """State is replaced by an alias of itself, and what it was before is moved."""
    params = parameters([(n,) for n in range(3, 10)])
    ours, theirs, copies = twins(name, params, lr=0.1)
    follow(ours, theirs, params, copies, steps=1)
    for optimizer, some in ((ours, params), (theirs, copies)):
        for param in some:  # apart from its neighbours
            param.data = param.data.clone()
            optimizer.state[param] = {k: v.clone() for k, v in optimizer.state[param].items()}
    follow(ours, theirs, params, copies, steps=1)
    old = []
    for optimizer in (ours, theirs):
        for entry in optimizer.state.values():
            old += entry.values()
            entry.update({key: value.detach() for key, value in entry.items()})
    follow(ours, theirs, params, copies, steps=1)
    for tensor in old:
        tensor.data = torch.zeros_like(tensor)
    follow(ours, theirs, params, copies)
    assert not any(tensor.any() for tensor in old)
