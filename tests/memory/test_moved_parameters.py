"""Parameters and state that are moved, cut, or made late, by anyone."""

import copy
import gc

import pytest
import torch
from cases import (
    FEW_SHAPES,
    OURS,
    TORCH,
    assert_follows,
    follow,
    give_gradients,
    is_packed,
    lists,
    network,
    pair,
    parameters,
    twins,
)
from torch import nn

import tritonopt
from tritonopt import slab


def set_data(model):
    for param in model.parameters():
        param.data = param.data.clone()


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


def test_moved_parameters_are_packed_once(name):
    model = network()
    ours, theirs, twin = pair(name, model)
    set_data(model)
    follow(ours, theirs, *lists(model, twin), 3)
    assert is_packed(ours, model.parameters())
    addresses = [p.data_ptr() for p in model.parameters()]
    follow(ours, theirs, *lists(model, twin), 3)
    assert addresses == [p.data_ptr() for p in model.parameters()]


def test_parameters_that_move_at_every_step_are_not_packed_at_every_step(name, monkeypatch):
    model = network()
    ours, theirs, twin = pair(name, model)
    allocations = []
    allocate = slab.allocate

    def counted(*args, **kwargs):
        allocations.append(args)
        return allocate(*args, **kwargs)

    monkeypatch.setattr(slab, "allocate", counted)
    follow(ours, theirs, *lists(model, twin), 1)
    allocations.clear()  # of the first step
    for _ in range(6):
        set_data(model)
        follow(ours, theirs, *lists(model, twin), 1)
    assert not allocations


def test_loaded_state_is_packed_once(name, monkeypatch):
    model = network()
    ours, theirs, twin = pair(name, model)
    follow(ours, theirs, *lists(model, twin), 2)
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    follow(ours, theirs, *lists(model, twin), 3)
    assert is_packed(ours, model.parameters())
    monkeypatch.setattr(slab, "allocate", None)
    follow(ours, theirs, *lists(model, twin), 3)


def test_loaded_state_that_somebody_holds(name):
    """Restarts write to the tensors that they took from the state; a module may own them."""
    params = parameters(FEW_SHAPES)
    ours, theirs, copies = twins(name, params, lr=0.1)
    held = []
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    follow(ours, theirs, params, copies, 1)
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        entries = optimizer.state.values()
        tensors = [t for entry in entries for key, t in sorted(entry.items()) if key != "step"]
        held.append([*tensors[:2], *(t.detach() for t in tensors[2:])])
    for _ in range(4):
        follow(ours, theirs, params, copies, 2)
        for mine, other in zip(*held, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
            mine.fill_(0.5), other.fill_(0.5)


def test_a_slice_of_a_piece_has_no_padding():
    """It fills a storage, too, where NumPy made it; behind it lies what is not ours."""
    (whole,) = parameters([(10, 32)])
    tritonopt.RMSprop([whole])
    array, before = whole.detach().numpy(), whole.detach().clone()
    params = [nn.Parameter(torch.from_numpy(row[:20])) for row in array]
    ours, theirs, copies = twins("RMSprop", params, weight_decay=0.1)
    follow(ours, theirs, params, copies)
    assert torch.equal(whole[:, 20:], before[:, 20:])


def test_two_optimizers_over_the_same_parameters(name):
    model = network()
    ours, theirs, twin = pair(name, model, lr=0.1)
    ours2 = OURS[name](model.parameters(), lr=0.01)
    theirs2 = TORCH[name](twin.parameters(), lr=0.01, foreach=False)
    follow(ours, theirs, *lists(model, twin), 2)
    addresses = [p.data_ptr() for p in model.parameters()]
    for _ in range(4):
        follow(ours, theirs, *lists(model, twin), 1)
        follow(ours2, theirs2, *lists(model, twin), 1)
    assert addresses == [p.data_ptr() for p in model.parameters()]
    del ours
    gc.collect()
    follow(ours2, theirs2, *lists(model, twin))


# Shapes and parts.


def test_parameter_and_state_cut_in_place(name, device):
    params = parameters([(40,), (40,), (40,)], device=device)
    ours, theirs, copies = twins(name, params, lr=0.1)
    follow(ours, theirs, params, copies, 2)
    whole = []
    for optimizer, some in ((ours, params), (theirs, copies)):
        state = optimizer.state[some[1]]
        some[1].grad = None
        whole.append([some[1].data, *[t for t in state.values() if t.dim()]])
        some[1].data = some[1].data[:33]
        for tensor in state.values():
            if tensor.dim():
                tensor.data = tensor.data[:33]
    follow(ours, theirs, params, copies)
    for mine, other in zip(*whole, strict=True):
        torch.testing.assert_close(mine[33:], other[33:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 32, 33, 39])
def test_a_packed_parameter_split_in_two(name, cut):
    """The padding that follows a piece would be the other half's memory."""
    kwargs = {"RMSprop": {"weight_decay": 0.1, "eps": 0.0}, "Rprop": {}}[name]
    a, w, b = parameters([(32,), (40,), (32,)])
    first = OURS[name]([a, w, b])
    halves = [nn.Parameter(w.data[:cut]), nn.Parameter(w.data[cut:])]
    params = [a, halves[0], b, halves[1]]
    ours, theirs, copies = twins(name, params, **kwargs)
    follow(ours, theirs, params, copies, 4)
    assert torch.equal(w, torch.cat(halves))
    del first


def test_a_parameter_cut_without_its_state_raises(name):
    params = parameters([(40,), (40,)])
    optimizer = OURS[name](params)
    give_gradients(params, params)
    optimizer.step()
    params[0].grad = None
    params[0].data = params[0].data[:33]
    params[0].grad = torch.ones(33)
    with pytest.raises(RuntimeError, match="must match the size"):
        optimizer.step()


# Deferred construction.


def test_lazy_linear(name):
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    ours = OURS[name](model.parameters())
    assert "2 without state" in ours.describe()
    inputs = torch.randn(2, 5)
    model(inputs)
    twin = copy.deepcopy(model)
    theirs = TORCH[name](twin.parameters(), foreach=False)
    follow(ours, theirs, *lists(model, twin), 4)
    assert is_packed(ours, model.parameters())


def test_meta_construction(name):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    ours = OURS[name](model.parameters())
    assert not ours.state and "4 without state" in ours.describe()
    torch.__future__.set_swap_module_params_on_conversion(True)  # else they are other parameters
    try:
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for param in model.parameters():
        nn.init.normal_(param)
    twin = copy.deepcopy(model)
    theirs = TORCH[name](twin.parameters(), foreach=False)
    follow(ours, theirs, *lists(model, twin), 4)


@pytest.mark.parametrize(
    "mode", [torch.device("meta"), torch.inference_mode()], ids=["meta", "inference"]
)
@pytest.mark.parametrize("during", ["construction", "step"])
def test_ambient_modes_change_nothing(name, mode, during):
    params = parameters(FEW_SHAPES)
    if during == "construction":
        with mode:
            ours = OURS[name](params, maximize=True)
    _, theirs, copies = twins(name, [nn.Parameter(p.detach().clone()) for p in params])
    theirs = TORCH[name](copies, foreach=False, maximize=True)
    if during == "step":
        ours = OURS[name](params, maximize=True)
    for _ in range(3):
        give_gradients(params, copies)
        with mode:
            ours.step()
        theirs.step()
        assert_follows(ours, theirs, params, copies)
    (params[0] ** 2).sum().backward()
