"""Where parameters and state lie: storages of their own, moves by anyone, aliases, lifetimes."""

import copy
import gc
import importlib.util
import io
import pickle
import tempfile
import warnings
import weakref

import numpy as np
import pytest
import torch
from cases import OURS, TORCH, assert_follows, follow, give_gradients, parameters, twins
from torch import nn

from tritonopt import slab
from tritonopt.device import path

SHAPES = [(3, 5), (40,), (), (64,), (7,)]


@pytest.fixture(params=OURS)
def name(request):
    return request.param


def with_empty(model):
    model.register_parameter("empty", nn.Parameter(torch.zeros(0, 3)))
    return model


def network(device="cpu"):
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(6, 5), nn.BatchNorm1d(5)
    return with_empty(nn.Sequential(*layers)).to(device)


def pair(name, model, **kwargs):
    """The model under our optimizer, and a twin of it under torch's."""
    twin = copy.deepcopy(model)
    ours = OURS[name](model.parameters(), **kwargs)
    return ours, TORCH[name](twin.parameters(), foreach=False, **kwargs), twin


def lists(*models):
    return [list(model.parameters()) for model in models]


def is_packed(optimizer, params):
    return all(
        slab.find(t) is not None
        for p in params
        for t in (p, *optimizer.state[p].values())
        if t.numel()
    )


# Storages of their own.


def saved_bytes(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.tell()


def test_saving_one_tensor_saves_no_other(name, device):
    params = parameters([(3000,)] * 8, device=device)
    optimizer = OURS[name](params)
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
    params = parameters(SHAPES)
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
    params = parameters(SHAPES)
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
    assert model[0].weight.data_ptr() == address
    del model, optimizer
    gc.collect()
    assert all(s() is None for s in slabs)


def test_stepping_keeps_no_moved_memory(name):
    model = network()
    optimizer = OURS[name](model.parameters())
    home = weakref.ref(slab.find(model[0].weight))
    model.double().float()
    for _ in range(3):
        give_gradients(*lists(model, model))
        optimizer.step()
    gc.collect()
    assert home() is None


# Moves.


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
    monkeypatch.setattr(slab, "allocate", lambda *a: allocations.append(a) or allocate(*a))
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
    "of a bytearray": of_bytes, "DLPack": exported, "mapped file": mapped,
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


def test_state_replaced_by_an_alias_whose_original_is_moved(name, device):
    """The address is the same, and the tensor that it was known by lies elsewhere now."""
    params = parameters(SHAPES, device=device)
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
    params = parameters(SHAPES)
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
    monkeypatch.setattr("tritonopt.sweep.PIECE", 64)
    params = parameters([(7,), (40,), (100,), (), (200,), (3, 3), (64,), (65,), (33,)])
    ours, theirs, copies = twins(name, params)
    assert len({slab.find(p) for p in params}) > 2
    follow(ours, theirs, params, copies, 4)


# Groups and state that change.


def test_add_param_group(name, device):
    params = parameters(SHAPES, device=device)
    ours, theirs, copies = twins(name, params[:2])
    follow(ours, theirs, params[:2], copies, 2)
    more = [nn.Parameter(p.detach().clone()) for p in params[2:]]
    ours.add_param_group({"params": params[2:], "lr": 0.5})
    theirs.add_param_group({"params": more, "lr": 0.5})
    assert is_packed(ours, params)
    follow(ours, theirs, params, copies + more, 4)


def remove_first(group):
    del group["params"][0]


def remove_middle(group):
    del group["params"][2]


def replace_list(group):
    group["params"] = group["params"][::-1]


def replace_some(group):
    group["params"] = [
        p if index % 2 else nn.Parameter(p.detach().clone())
        for index, p in enumerate(group["params"])
    ]


def raise_lr(group):
    group["lr"] = 0.5


def ascend(group):
    group["maximize"] = True


def use_foreach(group):
    group["foreach"] = True


CHANGES = [
    remove_first, remove_middle, replace_list, replace_some, raise_lr, ascend, use_foreach
]  # fmt: skip


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_groups(name, change, before):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params)
    follow(ours, theirs, params, copies, before)
    for optimizer in (ours, theirs):
        change(optimizer.param_groups[0])
    params, copies = (o.param_groups[0]["params"] for o in (ours, theirs))
    follow(ours, theirs, params, copies, 4)


def test_removed_and_appended_groups(name):
    params = parameters(SHAPES)
    ours = OURS[name]([{"params": [p]} for p in params])
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    theirs = TORCH[name]([{"params": [p]} for p in copies], foreach=False)
    follow(ours, theirs, params, copies, 2)
    for optimizer in (ours, theirs):
        group = optimizer.param_groups.pop(0)
        del optimizer.param_groups[1]
        optimizer.param_groups.append({**group, "lr": 0.3})
    follow(ours, theirs, params, copies, 4)
    assert ours.state[params[2]]["step"] == 2


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


def copied(state):
    return [(p, {k: t.clone() for k, t in entry.items()}) for p, entry in state.items()]


@pytest.mark.parametrize("change", STATE.values(), ids=STATE)
def test_changed_state(name, change):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params, lr=0.1)
    follow(ours, theirs, params, copies, 3)
    for optimizer in (ours, theirs):
        change(optimizer)
    follow(ours, theirs, params, copies, 4)


def test_other_entries_of_state_survive(name):
    params = parameters(SHAPES)
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


OPTIONS = [{"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_turned_on_before_the_first_step(options):
    params = parameters(SHAPES)
    ours, theirs, copies = twins("RMSprop", params)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0].update(options)
    assert "5 without state" in ours.describe()
    follow(ours, theirs, params, copies, 4)
    assert list(ours.state[params[0]]) == list(theirs.state[copies[0]])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_turned_on_after_a_step_raise_as_in_torch(options):
    params = parameters(SHAPES)
    ours, theirs, copies = twins("RMSprop", params)
    follow(ours, theirs, params, copies, 1)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0].update(options)
        with pytest.raises(KeyError):
            optimizer.step()


# Cost.


@pytest.mark.skipif(path(torch.device("cpu"))[0] != "eager", reason="the interpreter allocates")
def test_a_step_allocates_nothing(name):
    params = parameters([(300, 300), (1000,), (200_000,), (10, 10)] * 3)
    optimizer = OURS[name](params, **({"momentum": 0.9} if name == "RMSprop" else {}))
    give_gradients(params, params)
    for _ in range(3):
        optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
    assert allocated <= 0.01 * sum(p.nbytes for p in params)
