"""Parameters that anyone moves, casts or exchanges are updated where they lie."""

import copy

import pytest
import torch
from cases import (
    OURS,
    TORCH,
    assert_follows,
    follow,
    give_gradients,
    lists,
    network,
    pair,
    set_data,
)
from torch import nn


def set_one(model):
    model[1].weight.data = model[1].weight.data.clone()


def one_vector(model):
    vector = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    nn.utils.vector_to_parameters(vector, model.parameters())


def swapped(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def exchange(model):
    """Two parameters of one shape change places in the slab."""
    one, two = model[3].weight, model[3].bias
    one.data, two.data = two.data, one.data


def in_reverse(model):
    """Neighbours in a new buffer in reverse order."""
    params = list(model.parameters())[::-1]
    flat = torch.cat([p.detach().flatten() for p in params])
    for param, piece in zip(params, flat.split([p.numel() for p in params]), strict=True):
        param.data = piece.view(param.shape)


MOVES = {
    "half().float()": lambda model: model.half().float(),
    "double": lambda model: model.double(),
    "double().float()": lambda model: model.double().float(),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "p.data = clone": set_data,
    "one p.data = clone": set_one,
    "vector_to_parameters": one_vector,
    "reversed buffer": in_reverse,
    "exchanged": exchange,
    "swap_tensors": swapped,
    "share_memory": lambda model: model.share_memory(),
    "load_state_dict": lambda model: model.load_state_dict(network().state_dict()),
    "load_state_dict assign": lambda model: model.load_state_dict(
        {k: v.clone() for k, v in network().state_dict().items()}, assign=True
    ),
    "requires_grad": lambda model: model.requires_grad_(False).requires_grad_(True),
}


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("move", MOVES)
def test_moved_parameters_are_updated_where_they_lie(name, move, before, device):
    model = network(device)
    ours, theirs, twin = pair(name, model, lr=0.02)
    follow(ours, theirs, *lists(model, twin), before)
    for one in (model, twin):
        MOVES[move](one)
    follow(ours, theirs, *lists(model, twin), 4)


@pytest.mark.parametrize("before", [0, 2])
def test_cast_to_half_precision(name, before, device):
    model = network(device)
    ours, theirs, twin = pair(name, model, lr=0.1)
    follow(ours, theirs, *lists(model, twin), before)
    for one in (model, twin):
        one.bfloat16()
    for _ in range(3):
        give_gradients(*lists(model, twin))
        ours.step()
        theirs.step()
        for param, other in zip(*lists(model, twin), strict=True):
            torch.testing.assert_close(param, other, rtol=0.03, atol=0.03)
            for key, value in theirs.state[other].items():
                assert ours.state[param][key].dtype == value.dtype, key


@pytest.mark.parametrize("move", ["double", "channels_last", "p.data = clone", "swap_tensors"])
@pytest.mark.parametrize("foreach", [False, True])
def test_moved_before_the_first_step_of_torch(name, foreach, move):
    """Of a group that is left to torch, which makes state at that step."""
    model = network()
    twin = copy.deepcopy(model)
    ours = OURS[name](model.parameters(), foreach=foreach)
    theirs = TORCH[name](twin.parameters(), foreach=foreach)
    for one in (model, twin):
        MOVES[move](one)
    follow(ours, theirs, *lists(model, twin), 3)


def test_unused_state_of_a_group_that_was_made_differentiable(name):
    model = network()
    ours, theirs, twin = pair(name, model)
    for optimizer, one in ((ours, model), (theirs, twin)):
        optimizer.param_groups[0].update(differentiable=True, foreach=None)
        one.double()
    follow(ours, theirs, *lists(model, twin), 2)


LEFT = {
    "not dense": lambda param: torch.stack([param.detach().double()] * 2, -1)[..., 0],
    "complex": lambda param: param.detach().to(torch.complex64),
    "double": lambda param: param.detach().double(),
}


@pytest.mark.parametrize("kind", LEFT)
@pytest.mark.parametrize("tied", [False, True], ids=["alone", "tied"])
def test_a_parameter_that_comes_to_torch_before_the_first_step(name, tied, kind):
    groups = []
    for _ in range(2):
        first = torch.ones(3, 2)
        group = [nn.Parameter(first), nn.Parameter(first)][: 1 + tied]
        groups.append(group)
    ours, theirs = OURS[name](groups[0]), TORCH[name](groups[1], foreach=False)
    for group in groups:
        moved = LEFT[kind](group[0])
        for param in group:
            param.data = moved
    for _ in range(3):
        for params in zip(*groups, strict=True):
            grad = torch.randn_like(params[0])
            for param in params:
                param.grad = grad.clone()
        ours.step()
        theirs.step()
        assert_follows(ours, theirs, *groups)


def test_a_parameter_left_to_torch_that_comes_to_share_memory(name):
    """torch updates one after the other, in their order."""
    groups = []
    for kind in (OURS[name], TORCH[name]):
        params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2)[:, 0])]
        decay = {"weight_decay": 0.1} if name == "RMSprop" else {}
        groups.append(
            (kind(params, lr=0.1, **decay, foreach=None if not groups else False), params)
        )
    for step in range(4):
        for optimizer, (first, second) in groups:
            if step == 3:
                second.data = first.data
            first.grad, second.grad = torch.ones(2), torch.full((2,), -0.5)
            optimizer.step()
    (ours, params), (theirs, copies) = groups
    assert_follows(ours, theirs, params, copies)
