"""`optimizer.compile()`: equal to eager, whatever the sizes and values, in copies too."""

import copy
import io
import pickle

import pytest
import torch
from cases import TORCH
from compile_cases import (
    BACKENDS,
    KWARGS,
    NAMES,
    assert_close,
    fresh,
    give_gradients,
    graphs,
    optimizers,
    pairs,
    parameters,
    params_of,
    skip_interpreted,
)  # fmt: skip
from torch._dynamo.utils import counters

import tritonopt

__all__ = ["fresh"]  # an autouse fixture
pytestmark = skip_interpreted
slow = pytest.mark.slow
SWEEPS = [
    pytest.param(n, k, d, marks=[] if (n, k) == ("RMSprop", {}) else slow, id=f"{n}-{k}-{d}")
    for n in NAMES
    for k in KWARGS[n]
    for d in ((torch.float32, torch.float64, torch.bfloat16) if k else (torch.float32,))
]


@pytest.mark.parametrize(("name", "kwargs", "dtype"), SWEEPS)
def test_compiled_sweep(name, kwargs, dtype):
    shapes = ((3, 5), (), (0,), (700, 700), (7,))
    params = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters(shapes)]
    if dtype == torch.bfloat16:
        # Without what may cancel.
        kwargs = {k: v for k, v in kwargs.items() if k in ("momentum", "maximize")}
    ours, theirs = optimizers(name, params, **kwargs)
    ours.compile()
    for _ in range(1 if dtype == torch.bfloat16 else 4):  # rounding to half accumulates
        give_gradients(ours, theirs)
        ours.step()
        theirs.step()
    rtol = {torch.float32: 1e-3, torch.float64: 1e-10, torch.bfloat16: 3e-2}[dtype]
    assert_close(ours, theirs, 0.0 if name == "Rprop" else rtol)
    assert graphs() <= 3


@pytest.mark.slow
def test_special_values():
    """A gradient of NaN or infinity is no reason to differ from eager."""
    ours, theirs = optimizers("Rprop", parameters(((64,), (3,))))
    ours.compile()
    for _ in range(3):
        give_gradients(ours, theirs)
        for p, q in pairs(ours, theirs):
            for index, value in enumerate((float("nan"), float("inf"), -0.0)):
                p.grad[index] = q.grad[index] = value
        ours.step()
        theirs.step()
    for p, q in pairs(ours, theirs):
        torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_copies_are_compiled_too(duplicate):
    ours, theirs = optimizers("RMSprop", parameters())
    ours.compile(backend="aot_eager")
    for optimizer in (ours, theirs):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    ours = duplicate(ours)
    torch._dynamo.reset()
    counters.clear()
    give_gradients(ours, theirs)
    ours.step()
    theirs.step()
    assert graphs() == 1
    assert_close(ours, theirs, rtol=1e-5)


def test_description():
    optimizer = tritonopt.RMSprop(parameters())
    assert "  eager  " in optimizer.describe()
    optimizer.compile()
    assert "  compiled  " in optimizer.describe()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_decay", [0, -0.0, 1e-60])
def test_special_numbers(weight_decay, backend):
    """Without a decay nothing is added, not even 0; with a tiny one, 0 times infinity is."""
    start = torch.tensor([torch.inf, torch.nan, 1.0, -0.0, 0.0, -0.0])
    gradient = torch.tensor([1.0, 1.0, torch.inf, -0.0, -0.0, 0.0])
    kwargs = {"weight_decay": weight_decay, "centered": True, "alpha": 1.7}
    ours, theirs = optimizers("RMSprop", [torch.nn.Parameter(start)], TORCH, **kwargs)
    ours.compile(backend=backend)
    for optimizer in (ours, theirs):
        params_of(optimizer)[0].grad = gradient.clone()
        optimizer.step()
    rows = [(p, *o.state[p].values()) for o in (ours, theirs) for p in params_of(o)]
    for actual, expected in zip(*rows, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)
        known = ~expected.isnan()
        assert torch.equal(actual.signbit() & known, expected.signbit() & known)
