"""A parameter that is cut or split ends there: what lies behind it is not written to."""

import pytest
import torch
from cases import OURS, follow, give_gradients, parameters, twins
from torch import nn

import tritonopt


def test_a_slice_of_a_piece_has_no_padding():
    """It fills a storage, too, where NumPy made it; behind it lies what is not ours."""
    (whole,) = parameters([(10, 32)])
    tritonopt.RMSprop([whole])
    array, before = whole.detach().numpy(), whole.detach().clone()
    params = [nn.Parameter(torch.from_numpy(row[:20])) for row in array]
    ours, theirs, copies = twins("RMSprop", params, weight_decay=0.1)
    follow(ours, theirs, params, copies)
    assert torch.equal(whole[:, 20:], before[:, 20:])


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
