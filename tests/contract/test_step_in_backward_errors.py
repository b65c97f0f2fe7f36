"""What `step_in_backward` does not go with raises an error, and the next backward pass is right."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from backward_cases import attached, network
from cases import OURS, TORCH
from torch import nn
from torch.utils.checkpoint import checkpoint

import tritonopt

REFUSED = [
    ({"max_grad_norm": 1.0}, ValueError, "max_grad_norm needs all gradients"),
    ({"fused_amp": True}, ValueError, "fused_amp is for GradScaler"),
    ({"differentiable": True}, ValueError, "differentiable=True needs a graph"),
    ({"variant": "irprop+"}, ValueError, "'irprop\\+' needs the loss"),
]


@pytest.mark.parametrize("options, error, text", REFUSED, ids=lambda row: str(row)[:20])
def test_options(options, error, text):
    name = "Rprop" if "variant" in options else "RMSprop"
    with pytest.raises(error, match=text):
        attached(name, **options)


def test_an_option_set_later(name):
    model, optimizer, _ = attached(name)
    optimizer.max_grad_norm = 1.0
    with pytest.raises(ValueError, match="max_grad_norm needs all gradients"):
        model(torch.ones(3, 5)).backward()
    optimizer.max_grad_norm = None
    model(torch.ones(3, 5)).backward()


def test_what_is_attached(name):
    model, optimizer, handle = attached(name)
    with pytest.raises(RuntimeError, match="attached already"):
        tritonopt.step_in_backward(model, optimizer)
    handle.remove()
    with pytest.raises(TypeError, match="from_torch"):
        tritonopt.step_in_backward(model, TORCH[name](model.parameters()))
    wrapper = copy.copy(optimizer)
    wrapper.optimizer = optimizer  # as Lightning's, which imitates the class
    with pytest.raises(TypeError, match="give its .optimizer"):
        tritonopt.step_in_backward(model, wrapper)
    optimizer.add_param_group({"params": nn.LazyLinear(3).weight})
    with pytest.raises(ValueError, match="uninitialized parameter"):
        tritonopt.step_in_backward(model, optimizer)
    del optimizer.param_groups[1]
    with pytest.raises(ValueError, match="Invalid bucket_bytes"):
        tritonopt.step_in_backward(model, optimizer, -1)
    model(torch.ones(3, 5)).backward()
    with pytest.raises(RuntimeError, match="there are gradients already"):
        tritonopt.step_in_backward(model, optimizer)


def in_a_pass(model, what):
    x = torch.ones(3, 5, requires_grad=True)
    if what == "a gradient before":
        model.scale.grad = torch.ones(())
    if what == "reentrant":
        return checkpoint(model, x, use_reentrant=True).backward
    return lambda: model(x).backward(create_graph=what == "create_graph")


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize(
    "what, text",
    [
        ("a gradient before", "had a gradient before"),
        ("create_graph", "create_graph=True"),
        ("reentrant", "use_reentrant=False"),
    ],
)
def test_what_a_pass_cannot_do(name, what, text):
    model, optimizer, _ = attached(name, 2**30)
    with pytest.raises(RuntimeError, match=text):
        in_a_pass(model, what)()
    assert not optimizer.state
    if what == "a gradient before":
        assert model.scale.grad is not None
        optimizer.zero_grad()
    model(torch.ones(3, 5)).backward()
    assert optimizer.state[model.scale]["step"] == 1


@pytest.mark.parametrize("way", ["step", "closure"])
def test_gradients_of_several_passes(name, way):
    """A step after them says that they were not summed up; then one step for each goes on."""
    model, optimizer, _ = attached(name)

    def closure():
        loss = model(torch.ones(3, 5))
        loss.backward()
        return loss

    for _ in range(2):
        closure()
        optimizer.step()
    closure()
    with pytest.raises(RuntimeError, match="updated by more than one backward pass"):
        if way == "step":
            closure()
        optimizer.step(None if way == "step" else closure)
    for _ in range(2):
        optimizer.step(closure)
    assert optimizer.state[model.scale]["step"] == 6


def test_passes_of_different_parameters(name):
    model = torch.nn.ModuleList([torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)])
    optimizer = OURS[name](model.parameters())
    tritonopt.step_in_backward(model, optimizer)
    for _ in range(3):
        between = model[0](torch.ones(4, 3))
        between.sum().backward()
        model[1](between.detach()).sum().backward()
        optimizer.step()
    assert all(entry["step"] == 3 for entry in optimizer.state.values())


def test_a_scaler(name):
    model, optimizer, _ = attached(name)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(3, 5))).backward()
    with pytest.raises(RuntimeError, match="goes neither with GradScaler nor"):
        scaler.step(optimizer)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError


@pytest.mark.parametrize("bucket_bytes", [0, 2**30])
def test_a_pass_that_fails(name, bucket_bytes):
    """Gradients that waited are freed with it."""
    model, optimizer, _ = attached(name, bucket_bytes)
    x = torch.ones(3, 5)
    with pytest.raises(ArithmeticError):
        model(Fails.apply(model.layers[0](x))).backward()
    assert not [p for p in model.parameters() if p.grad is not None]
    updated = [*optimizer.state]
    assert len(updated) == (6 if bucket_bytes == 0 else 0)
    model(x).backward()
    assert len(optimizer.state) == 7
    for param, entry in optimizer.state.items():
        assert entry["step"] == 1 + any(param is p for p in updated)


@pytest.mark.parametrize("bucket_bytes", [0, 2**30])
def test_a_step_that_fails(name, bucket_bytes):
    """In the pass, and at its end."""
    embedding = nn.Embedding(4, 3, sparse=True)
    other = nn.Parameter(torch.ones(3))
    optimizer = OURS[name]([other, embedding.weight])
    tritonopt.step_in_backward(embedding, optimizer, bucket_bytes)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        (embedding(torch.tensor([1])) * other).sum().backward()
    assert embedding.weight.grad is None and other.grad is None
    (embedding.weight * other).sum().backward()
    assert optimizer.state[embedding.weight]["step"] == 1


def test_an_old_value_that_is_needed(name):
    """Of a parameter whose gradient is complete: autograd knows."""
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = OURS[name]([first, second])
    tritonopt.step_in_backward(nn.ParameterList([first, second]), optimizer, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ((first * 2) * second.detach() * second).sum().backward()
    assert first.grad is None and second.grad is None
    (first * second).sum().backward()
    assert optimizer.state[first]["step"] == 1


def test_passes_of_two_threads(name):
    """One begins while the other one waits in a hook."""
    model, _, _ = attached(name)
    inside, go_on = threading.Event(), threading.Event()
    model.layers[0].weight.register_hook(lambda _: (inside.set(), go_on.wait(20)) and None)
    thread = threading.Thread(target=lambda: model(torch.ones(3, 5)).backward())
    thread.start()
    assert inside.wait(20)
    try:
        with pytest.raises(RuntimeError, match="inside or beside another"):
            model(torch.ones(3, 5), skip=0).backward()
    finally:
        go_on.set()
        thread.join()
    assert not [p for p in model.parameters() if p.grad is not None]


def test_ddp_and_fsdp(name, monkeypatch):
    """Around the model that is given, or not seen from it."""
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model = network()
    optimizer = OURS[name](model.parameters())
    with pytest.raises(RuntimeError, match="DistributedDataParallel reduces gradients after"):
        tritonopt.step_in_backward(wrapper, optimizer)
    tritonopt.step_in_backward(model, optimizer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="DistributedDataParallel reduces gradients after"):
        model(torch.ones(3, 5)).backward()
    assert not optimizer.state


@pytest.mark.filterwarnings("error")
def test_copies_are_not_attached(name):
    model, optimizer, _ = attached(name)
    optimizer.add_param_group({"params": torch.ones(2, requires_grad=True)})  # no nn.Parameter
    model(torch.ones(3, 5)).backward()
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    copies = [copy.deepcopy((model, optimizer)), torch.load(file, weights_only=False)]
    copies += [pickle.loads(pickle.dumps((model, optimizer)))]
    for twin, other in copies:
        twin(torch.ones(3, 5)).backward()
        assert twin.scale.grad is not None and other.state[twin.scale]["step"] == 1
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.zeros(()))
        scaler.step(other)
        assert other.state[twin.scale]["step"] == 2


def test_what_is_kept_alive(name):
    """By the model: what trains it. Not by itself, which would be a leak."""
    model, optimizer, handle = attached(name)
    known = weakref.ref(optimizer), weakref.ref(model.scale)
    del optimizer, handle
    gc.collect()
    model(torch.ones(3, 5)).backward()
    assert model.scale.grad is None and known[0]().state[model.scale]["step"] == 1
    del model
    gc.collect()
    assert known[0]() is None and known[1]() is None
