"""Packed tensors have storages and layouts as if they were alone; a step allocates little."""

import copy
import gc
import importlib.util
import io
import pickle
import weakref

import pytest
import torch
from cases import (
    FEW_SHAPES,
    OURS,
    TORCH,
    follow,
    give_gradients,
    lists,
    network,
    pair,
    parameters,
    twins,
)
from torch import nn

from tritonopt import slab
from tritonopt.device import path

# Storages of their own.


def saved_bytes(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.tell()


def test_saving_one_tensor_saves_no_other(name, device):
    params = parameters([(3000,)] * 8, device=device)
    optimizer = OURS[name](params)
    give_gradients(params, params)
    optimizer.step()
    for param in params:
        assert slab.find(param) is not None
        for tensor in (param, *optimizer.state[param].values()):
            assert tensor.storage_offset() == 0
            assert saved_bytes(tensor) <= 2 * tensor.nbytes + 4096


def test_a_checkpoint_holds_no_padding(name, device):
    params = parameters([(3,)] * 200, device=device)
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 1)
    assert saved_bytes(ours.state_dict()) <= saved_bytes(theirs.state_dict()) * 1.01


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": lambda pair: reloaded(pair),
}


def reloaded(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_of_model_and_optimizer_trains_alone(name, duplicate, before):
    model = network()
    ours, theirs, twin = pair(name, model)
    follow(ours, theirs, *lists(model, twin), before)
    model2, ours2 = duplicate((model, ours))
    twin2, theirs2 = copy.deepcopy((twin, theirs))
    kept = [p.detach().clone() for p in model.parameters()]
    follow(ours2, theirs2, *lists(model2, twin2), 4)
    assert all(map(torch.equal, model.parameters(), kept))
    follow(ours, theirs, *lists(model, twin), 4)


def test_sharing_one_parameter(name):
    params = parameters(FEW_SHAPES)
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 1)
    params[1].data.share_memory_()
    ours.state[params[1]][ours_key(name)].share_memory_()
    tensors = params[1], ours.state[params[1]][ours_key(name)]
    addresses = [t.data_ptr() for t in tensors]
    follow(ours, theirs, params, copies, 4)
    assert addresses == [t.data_ptr() for t in tensors]
    assert [p.is_shared() for p in params] == [False, True, False, False, False]


def ours_key(name):
    return {"RMSprop": "square_avg", "Rprop": "prev"}[name]


def test_resizing_one_storage_frees_no_other(name):
    params = parameters(FEW_SHAPES)
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 1)
    with pytest.raises(RuntimeError, match="not resizable"):
        params[1].untyped_storage().resize_(0)
    follow(ours, theirs, params, copies)


@pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="no safetensors")
def test_safetensors(name, tmp_path):
    from safetensors.torch import load_model, save_model

    model = network()
    OURS[name](model.parameters())
    save_model(model, tmp_path / "model.safetensors")
    other = network()
    load_model(other, tmp_path / "model.safetensors")
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_slab_lives_as_long_as_its_pieces(name):
    model = network()
    optimizer = OURS[name](model.parameters())
    give_gradients(*lists(model, model))
    optimizer.step()
    slabs = [
        weakref.ref(slab.find(t))
        for p in model.parameters()
        for t in (p, *optimizer.state[p].values())
        if t.numel()
    ]
    home, address = weakref.ref(slab.find(model[0].weight)), model[0].weight.data_ptr()
    del optimizer
    gc.collect()
    assert home() is not None and any(s() is None for s in slabs)
    optimizer = OURS[name](model.parameters())
    optimizer.step()
    assert model[0].weight.data_ptr() == address
    del model, optimizer
    gc.collect()
    assert all(s() is None for s in slabs)


def test_stepping_keeps_no_moved_memory(name):
    model = network()
    optimizer = OURS[name](model.parameters())
    give_gradients(*lists(model, model))
    optimizer.step()
    home = weakref.ref(slab.find(model[0].weight))
    model.double().float()
    for _ in range(3):
        give_gradients(*lists(model, model))
        optimizer.step()
    gc.collect()
    assert home() is None


# Memory layouts.


def strided(shape, stride):
    size = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    return torch.randn(size).as_strided(shape, stride)


LAYOUTS = {
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels_last 1x1": lambda: torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last),
    "one input channel": lambda: torch.randn(4, 1, 3, 3),
    "transposed": lambda: torch.randn(4, 7).t(),
    "permuted": lambda: torch.randn(2, 3, 4).permute(2, 0, 1),
    "strides of size 1": lambda: strided((1, 5, 1), (7, 1, 3)),
    "not dense": lambda: torch.randn(6, 8)[:, ::2],
    "rows with gaps": lambda: torch.randn(6, 8)[:, :5],
    "lazily negated": lambda: torch._neg_view(torch.randn(2000)),
    "0-dim": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0),
    "empty, 2-dim": lambda: torch.randn(3, 0),
    "offset 1": lambda: torch.randn(2000)[1:1501],
    "offset 2": lambda: torch.randn(2000)[2:1502],
    "offset 3": lambda: torch.randn(2000)[3:1503],
}


@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_memory_layouts(name, make, place):
    params = parameters([(7,), (33,)])
    param = nn.Parameter(make())
    params.insert(place, param)
    stride = param.stride()
    ours, theirs, copies = twins(name, params, lr=0.1)
    follow(ours, theirs, params, copies, 4)
    assert param.stride() == stride


def test_a_packed_convolution_keeps_its_output_layout(name):
    """One input channel: with other strides in the dimension of size 1 it looks channels_last."""
    for layer in (nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4)):
        inputs = torch.randn(2, layer.in_channels, 6, 6)
        stride = layer(inputs).stride()
        OURS[name](layer.parameters())
        assert layer(inputs).stride() == stride


def test_views_of_one_buffer_stay_there(name, device):
    buffer = torch.randn(2048, device=device)
    bounds = [(1, 8), (8, 20), (21, 1030), (1030, 1031), (1100, 1300)]
    params = [nn.Parameter(buffer[a:b]) for a, b in bounds]
    outside = buffer.clone()
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 4)
    for (a, b), param in zip(bounds, params, strict=True):
        assert torch.equal(buffer[a:b], param)
        outside[a:b] = param.detach()
    assert torch.equal(buffer, outside)


def test_expanded_parameter_raises_as_in_torch(name):
    texts = []
    for kind in (OURS[name], TORCH[name]):
        param = nn.Parameter(torch.zeros(1).expand(3))
        optimizer = kind([param], **({} if kind is OURS[name] else {"foreach": False}))
        param.grad = torch.ones(3)
        with pytest.raises(RuntimeError) as error:
            optimizer.step()
        texts.append(str(error.value))
    assert texts[0] == texts[1]


def test_several_slabs_and_pieces(name, monkeypatch):
    monkeypatch.setattr(slab, "MAX_BYTES", 600)
    monkeypatch.setattr("tritonopt.sweep.Sweep._piece", lambda *_: 64)
    params = parameters([(7,), (40,), (100,), (), (200,), (3, 3), (64,), (65,), (33,)])
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, 4)
    assert len({slab.find(p) for p in params}) > 2


# Cost.


@pytest.mark.skipif(path(torch.device("cpu"))[0] != "eager", reason="the interpreter allocates")
def test_a_step_allocates_little(name):
    """Gradients of small tensors, side by side."""
    params = parameters([(300, 300), (1000,), (200_000,), (10, 10)] * 3)
    optimizer = OURS[name](params, **({"momentum": 0.9} if name == "RMSprop" else {}))
    give_gradients(params, params)
    for _ in range(3):
        optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
    assert allocated <= 0.02 * sum(p.nbytes for p in params)
