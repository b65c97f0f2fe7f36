"""Numbers on which implementations differ: NaN, infinities, signed zeros, digits."""

import itertools

import pytest
import torch
from cases import assert_follows, give_gradients, parameters, twins
from torch import nn

SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, 1e-30, -1e30]
SEQUENCES = torch.tensor(list(itertools.product(SPECIAL, repeat=3)), dtype=torch.float64).t()


def bits(tensor):
    """Such that NaN equals NaN, and 0.0 does not equal -0.0."""
    tensor = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor.detach())
    return tensor.view({4: torch.int32, 8: torch.int64}[tensor.itemsize])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("start", [0.0, -0.0, 1.5, float("inf"), float("nan")])
@pytest.mark.parametrize("maximize", [False, True], ids=["min", "max"])
@pytest.mark.parametrize("step_sizes", [(1e-6, 50), (0.0, float("inf"))], ids=str)
def test_rprop_of_every_sequence_of_special_gradients(dtype, start, maximize, step_sizes, device):
    param = nn.Parameter(torch.full(SEQUENCES.shape[1:], start, dtype=dtype, device=device))
    lr = 1e38 if step_sizes[1] > 50 and dtype == torch.float32 else 0.1
    ours, theirs, copies = twins(
        "Rprop", [param], lr=lr, maximize=maximize, step_sizes=step_sizes, etas=(0.5, 4.0)
    )
    for grads in SEQUENCES:
        param.grad = grads.to(param)
        copies[0].grad = param.grad.clone()
        ours.step()
        theirs.step()
        assert torch.equal(bits(param), bits(copies[0]))
        for key in ("prev", "step_size"):  # a kernel negates by subtracting from 0.0: never -0.0
            mine, other = (
                bits(o.state[p][key] + 0.0) for o, p in ((ours, param), (theirs, copies[0]))
            )
            assert torch.equal(mine, other), key


SINGLE_AND_DOUBLE = [torch.float32, torch.float64]
OPTIONS = [
    {},
    {"eps": 0.0},
    {"centered": True},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"centered": True, "momentum": 0.9, "eps": 0.0, "maximize": True},
    {"alpha": 1.0},
    {"alpha": 1.5, "centered": True},
]


@pytest.mark.parametrize("dtype", SINGLE_AND_DOUBLE, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rmsprop_of_every_sequence_of_special_gradients(options, dtype, device):
    param = nn.Parameter(torch.full(SEQUENCES.shape[1:], 1.5, dtype=dtype, device=device))
    ours, theirs, copies = twins("RMSprop", [param], **options)
    for grads in SEQUENCES:
        param.grad = grads.to(param)
        copies[0].grad = param.grad.clone()
        ours.step()
        theirs.step()
        assert_follows(ours, theirs, [param], copies)


def test_a_constant_gradient_centered():
    """`square_avg - grad_avg**2` rounds below zero: NaN, as in torch, and not in the neighbours."""
    params = parameters([(700,), (5,), (700,)])
    ours, theirs, copies = twins("RMSprop", params, centered=True, alpha=0.5, eps=1e-8)
    constants = [torch.randn(p.shape) for p in params]
    for _ in range(40):
        for param, other, value in zip(params, copies, constants, strict=True):
            param.grad, other.grad = value.clone(), value.clone()
        ours.step()
        theirs.step()
    for param, other in zip(params, copies, strict=True):
        if ours.state[param]["square_avg"].isfinite().all():  # rounding decides which ones
            assert torch.equal(param.isnan(), other.isnan()) or param.isnan().any()
    assert any(p.isnan().any() for p in copies)
    assert any(p.isnan().any() for p in params)


def test_eps_zero_of_zero_gradients(device):
    """0 / 0 is NaN where the gradient is zero; nothing else is touched."""
    params = parameters([(5,), (33,), (7,)], device=device)
    ours, theirs, copies = twins("RMSprop", params, eps=0.0)
    for _ in range(3):
        give_gradients(params, copies)
        for some in (params, copies):
            some[1].grad.zero_()
        ours.step()
        theirs.step()
        assert_follows(ours, theirs, params, copies)
    assert params[1].isnan().all() and not params[0].isnan().any() and not params[2].isnan().any()


# Digits.


def test_hyperparameters_of_double_parameters_keep_their_digits(name, device):
    """A factor rounded to fp32 shows in the 8th digit."""
    kwargs = {
        "RMSprop": {
            "lr": 0.1, "alpha": 0.9, "eps": 0.3, "weight_decay": 0.7, "momentum": 0.6,
        },
        "Rprop": {"lr": 0.1, "etas": (0.3, 1.7), "step_sizes": (0.07, 0.35)},
    }[name]  # fmt: skip
    params = parameters([(3, 5), (40,)], torch.float64, device)
    ours, theirs, copies = twins(name, params, **kwargs)
    for _ in range(6):
        give_gradients(params, copies)
        ours.step()
        theirs.step()
        assert_follows(ours, theirs, params, copies, rtol=1e-13, atol=1e-14)


def test_mixed_dtypes(name, device):
    dtypes = [torch.float32, torch.float64] * 3
    params = [nn.Parameter(torch.randn(9, device=device, dtype=dtype)) for dtype in dtypes]
    params.insert(2, nn.Parameter(torch.randn(9, device=device, dtype=torch.bfloat16)))
    ours, theirs, copies = twins(name, params)
    for _ in range(3):
        give_gradients(params, copies)
        ours.step()
        theirs.step()
        for param, other in zip(params, copies, strict=True):
            half = param.dtype == torch.bfloat16
            limits = {"rtol": 2e-2, "atol": 2e-2} if half else {"rtol": 2e-5, "atol": 2e-6}
            torch.testing.assert_close(param, other, **limits)


def test_a_weight_decay_that_is_a_tensor_of_zero():
    params = [torch.nn.Parameter(torch.tensor([1.0, float("inf")]))]
    ours, theirs, copies = twins("RMSprop", params, weight_decay=torch.tensor(0.0))
    for _ in range(2):
        give_gradients(params, copies)
        ours.step()
        theirs.step()
        assert_follows(ours, theirs, params, copies)
