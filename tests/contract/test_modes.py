"""Who watches a step, or runs it on tensors without values, sees what torch's for-loop does."""

import contextlib

import pytest
import torch
from cases import FEW_SHAPES, OURS, TORCH, assert_follows, give_gradients, parameters, twins
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tritonopt import plan

SHAPES = [(3, 5), (40,), (), (7,)]


class Operators(TorchDispatchMode):
    """Writes down every operator."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Writes down every call of torch's functions."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def plans(monkeypatch):
    """The plans that update something."""
    called = []
    update = plan.Plan.__call__

    def watched(self, *args, **kwargs):
        called.append(self)
        return update(self, *args, **kwargs)

    monkeypatch.setattr(plan.Plan, "__call__", watched)
    return called


def updates(seen):
    """The in-place operators; others may be called more or less often."""
    names = [op.removeprefix("aten.").split(".")[0] for op in seen]
    return [name for name in names if name.endswith("_") and not name.endswith("__")]


@pytest.mark.parametrize("mode", [Operators, Functions])
@pytest.mark.parametrize("before", [0, 2], ids=["first step", "third step"])
def test_a_mode_sees_what_torch_does(name, mode, before, plans):
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params, lr=0.1)
    for _ in range(before):
        give_gradients(params, copies)
        ours.step()
        theirs.step()
    give_gradients(params, copies)
    seen = []
    for optimizer in (ours, theirs):
        with mode() as watching:
            optimizer.step()
        seen.append(updates(watching.seen))
    assert seen[1], "torch updates in place"
    assert seen[0] == seen[1]
    del plans[:]
    give_gradients(params, copies)  # without a mode, it is as fast as ever
    ours.step()
    theirs.step()
    assert plans
    for param, copy in zip(params, copies, strict=True):
        torch.testing.assert_close(param, copy, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("context", ["default device", "with torch.device"])
def test_a_default_device_is_no_watching_mode(name, context, plans):
    params = parameters(SHAPES)
    optimizer = OURS[name](params)
    for param in params:
        param.grad = torch.randn_like(param)
    with contextlib.ExitStack() as stack:
        if context == "default device":
            torch.set_default_device("cpu")
            stack.callback(torch.set_default_device, None)
        else:
            stack.enter_context(torch.device("cpu"))
        optimizer.step()
        optimizer.step()
    assert len(plans) == 2


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


def test_a_backward_after_the_step_under_saved_mutation(name):
    """What a step overwrites is kept for a later backward, which the mode must notice."""
    found = []
    for cls, kwargs in ((OURS[name], {}), (TORCH[name], {"foreach": False})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = cls(model.parameters(), lr=0.1, **kwargs)
        x = torch.randn(5, 4, requires_grad=True)
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            for _ in range(2):
                out = model(x)
                out.square().mean().backward(retain_graph=True)
                optimizer.step()
                optimizer.zero_grad()
                x.grad = None
                out.abs().mean().backward()
        found.append([x.grad, *(p.grad for p in model.parameters()), *model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("what", ["parameters", "state"])
def test_a_later_backward_notices_the_step(name, what):
    """A graph that has saved what the step writes raises, and gives no wrong gradient."""
    messages = []
    for cls, kwargs in ((OURS[name], {}), (TORCH[name], {"foreach": False})):
        params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))]
        optimizer = cls(params, **kwargs)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        saved = [params[0]] if what == "parameters" else [*optimizer.state[params[0]].values()]
        for tensor in saved:
            weight = torch.ones(tensor.shape, requires_grad=True)
            loss = (weight * tensor).sum()
            optimizer.step()
            with pytest.raises(RuntimeError, match="modified by an inplace operation") as raised:
                loss.backward()
            messages.append(str(raised.value)[:90])
    assert len({*messages}) == 1


@pytest.mark.parametrize("lr", [0.1, 0.0])
@pytest.mark.parametrize("options", [{}, {"maximize": True, "foreach": True}], ids=str)
def test_fake_tensors(name, lr, options):
    shapes = []
    for cls, kwargs in ((OURS[name], {}), (TORCH[name], {"foreach": False})):
        with FakeTensorMode():
            model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
            optimizer = cls(model.parameters(), lr=lr, **{**kwargs, **options})
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(2, 4)).sum().backward()
                optimizer.step()
        shapes.append(
            [{k: (v.shape, v.dtype) for k, v in e.items()} for e in optimizer.state.values()]
        )
    assert shapes[0] == shapes[1]


def test_real_tensors_under_fake_tensor_mode(name):
    """Only for a while: what it leaves behind trains on."""
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params, lr=0.1)
    give_gradients(params, copies)
    ours.step()
    theirs.step()
    raised = []
    for optimizer in (ours, theirs):
        with FakeTensorMode():
            try:
                optimizer.step()
                raised.append(None)
            except Exception as error:
                raised.append(type(error))
    assert raised[0] == raised[1]
    for _ in range(2):
        give_gradients(params, copies)
        ours.step()
        theirs.step()
    for param, copy in zip(params, copies, strict=True):
        torch.testing.assert_close(param, copy, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("lr", [0.1, 0.0])
def test_tensors_without_memory(name, lr):
    keys = []
    for cls, kwargs in ((OURS[name], {}), (TORCH[name], {"foreach": False})):
        param = nn.Parameter(torch.ones(3, 2, device="meta"))
        optimizer = cls([param], lr=lr, **kwargs)
        for _ in range(2):
            param.grad = torch.ones_like(param)
            optimizer.step()
        state = optimizer.state[param]
        keys.append([(k, v.device.type, v.dtype, v.shape) for k, v in state.items()])
        assert float(state["step"]) == 2
    assert keys[0] == keys[1]


def test_a_gradient_of_a_class_of_its_own(name):
    """As a compressed or a quantized one; parameters and state are plain."""
    two = pytest.importorskip("torch.testing._internal.two_tensor")
    params = parameters(SHAPES)
    ours, theirs, copies = twins(name, params, lr=0.1)
    for wrapped in (False, True, True, False):
        give_gradients(params, copies)
        if wrapped:
            for param in (params[0], copies[0]):
                grad = param.grad
                param.grad = None
                param.grad = two.TwoTensor(grad, grad.clone())
        ours.step()
        theirs.step()
    assert [float(ours.state[p]["step"]) for p in params] == [4.0] * 4
    assert all(type(p) is nn.Parameter for p in params)


@pytest.mark.parametrize("before", [0, 2], ids=["at the first step", "later"])
@pytest.mark.parametrize("count", [1, 4])
def test_a_parameter_that_was_moved_in_inference_mode(name, count, before):
    params = parameters([(3,)] * count)
    ours, theirs, copies = twins(name, params)
    for step in range(4):
        if step == before:
            with torch.inference_mode():
                for param in params + copies:
                    param.data = param.detach().clone()
        give_gradients(params, copies)
        ours.step()
        theirs.step()
        for param, copy in zip(params, copies, strict=True):
            assert torch.equal(param, copy)
            assert ours.state[param].keys() == theirs.state[copy].keys()
            for key, value in theirs.state[copy].items():
                assert torch.equal(ours.state[param][key], value)
