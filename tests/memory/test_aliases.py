"""What is tied, viewed or held stays so."""

import copy
import tempfile
import warnings

import numpy as np
import pytest
import torch
from cases import (
    FEW_SHAPES,
    OURS,
    TORCH,
    follow,
    lists,
    network,
    pair,
    parameters,
    twins,
)
from torch import nn

# Aliases held before construction.


def mapped(shape):
    file = tempfile.NamedTemporaryFile()
    file.write(bytes(4 * 12))
    file.flush()
    alias = torch.from_file(file.name, shared=True, size=12)
    return nn.Parameter(torch.from_file(file.name, shared=True, size=12)), (alias, file)


def of_array(shape):
    array = np.ones(12, np.float32)
    return nn.Parameter(torch.from_numpy(array)), (torch.from_numpy(array), array)


def of_bytes(shape):
    memory = bytearray(4 * 12)
    return nn.Parameter(torch.frombuffer(memory, dtype=torch.float32)), (
        torch.frombuffer(memory, dtype=torch.float32), memory,
    )  # fmt: skip


def exported(shape):
    param = nn.Parameter(torch.randn(12))
    return param, (torch.from_dlpack(torch.utils.dlpack.to_dlpack(param.detach())),)


def exported_itself(shape):
    """The capsule holds the tensor, which its storage does not know."""
    tensor = torch.randn(12)
    array = np.from_dlpack(tensor)
    return tensor.requires_grad_(), (torch.from_numpy(array), array)


def storage_held(shape):
    param = nn.Parameter(torch.randn(12))
    storage = param.untyped_storage()
    return param, (torch.empty(0).set_(storage), storage)


def seen_by_numpy(shape):
    param = nn.Parameter(torch.randn(12))
    array = param.detach().numpy()
    return param, (torch.from_numpy(array), array)


def of_a_buffer(shape):
    buffer = torch.randn(40)
    return nn.Parameter(buffer[5:17]), (buffer[5:17],)


def detached(shape):
    param = nn.Parameter(torch.randn(12))
    return param, (param.detach(),)


ALIASES = {
    "detached": detached, "numpy view": seen_by_numpy, "of a numpy array": of_array,
    "of a bytearray": of_bytes, "DLPack": exported, "DLPack of itself": exported_itself,
    "storage": storage_held, "mapped file": mapped,
    "of a buffer": of_a_buffer,
}  # fmt: skip


@pytest.mark.parametrize("make", ALIASES.values(), ids=ALIASES)
def test_an_alias_follows(name, make):
    param, (alias, *_) = make(12)
    params = [*parameters([(7,)]), param, *parameters([(5,)])]
    ours, theirs, copies = twins(name, params)
    for _ in range(4):
        follow(ours, theirs, params, copies, 1)
        assert torch.equal(alias, param)


def test_a_held_state_dict_follows(name, device):
    model = network(device)
    held = model.state_dict()
    ours, theirs, twin = pair(name, model)
    for _ in range(4):
        follow(ours, theirs, *lists(model, twin), 1)
        assert all(torch.equal(held[k], v) for k, v in model.named_parameters())


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


def test_state_replaced_by_an_alias_whose_original_is_moved(name, device):
    """The address is the same, and the tensor that it was known by lies elsewhere now."""
    params = parameters(FEW_SHAPES, device=device)
    aliases = [p.detach() for p in params[::2]]  # updated in place
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 2)
    for optimizer in (ours, theirs):
        for entry in optimizer.state.values():
            for key in entry.keys() - {"step"}:
                original = entry[key]
                entry[key] = original.detach()
                original.data = torch.full_like(original, 100.0)
    follow(ours, theirs, params, copies, 3)
    assert all(p.data_ptr() == a.data_ptr() for p, a in zip(params[::2], aliases, strict=True))


def test_a_graph_recorded_before_construction(name):
    params = parameters([(5,), (5,)])
    loss = (params[0] ** 2 * params[1]).sum()
    expected = torch.autograd.grad(loss, params, retain_graph=True)
    OURS[name](params)
    assert all(map(torch.equal, torch.autograd.grad(loss, params), expected))


def test_tied_by_data(name, device):
    """Two Parameters on one storage: updated one after the other, never untied."""
    params = parameters([(7,), (12,), (5,)], device=device)
    params.append(nn.Parameter(params[1].data))
    address = params[1].data_ptr()
    ours = OURS[name](params)
    copies = [nn.Parameter(p.detach().clone()) for p in params[:3]]
    copies.append(nn.Parameter(copies[1].data))
    theirs = TORCH[name](copies, foreach=False)
    follow(ours, theirs, params, copies, 4)
    assert params[1].data_ptr() == params[3].data_ptr() == address


def test_tied_after_construction(name, device):
    params = parameters([(7,), (12,), (12,), (5,)], device=device)
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 2)
    for some in (params, copies):
        some[2].data = some[1].data
    follow(ours, theirs, params, copies, 4)
    assert params[1].data_ptr() == params[2].data_ptr()


def test_tied_by_identity(name):
    model = network()
    model[3].bias = model[3].weight
    ours, theirs, twin = pair(name, model)
    follow(ours, theirs, *lists(model, twin), 3)
    assert ours.state[model[3].weight]["step"] == 3
    assert model[3].bias is model[3].weight


def test_explicit_duplicates_step_twice(name):
    """torch warns, and updates them twice."""
    a, b = parameters([(7,), (12,)])
    c, d = (nn.Parameter(p.detach().clone()) for p in (a, b))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = OURS[name]([a, b, a])
        theirs = TORCH[name]([c, d, c], foreach=False)
    follow(ours, theirs, [a, b], [c, d], 4)
    assert ours.state[a]["step"] == 8
