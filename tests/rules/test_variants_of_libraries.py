"""The options that the README names make RMSprop that of each library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from foreign_cases import timm_rmsprop_tf
from variant_cases import STEPS, random_starts, train, trained, valley

# Against the libraries.


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ({"lr_in_momentum": False}, {}),
        ({"momentum": 0.9}, {"momentum": 0.9, "lr_in_momentum": True}),
        ({"momentum": 0.9, "lr_in_momentum": False}, {"momentum": 0.9}),
        ({"centered": True}, {"centered": True}),
        (
            {"weight_decay": 0.1, "decoupled_decay": True},
            {"weight_decay": 0.1, "decoupled_weight_decay": True},
        ),
        ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
    ],
    ids=["plain", "momentum", "momentum without lr", "centered", "decoupled", "l2"],
)
def test_timm(theirs, ours, monkeypatch):
    common = {"lr": 0.01, "alpha": 0.9, "eps": 1e-3}
    param = torch.nn.Parameter(random_starts())
    train(timm_rmsprop_tf(monkeypatch)([param], **common, **theirs), [param])
    options = {"eps_in_sqrt": True, "initial_scale": 1.0, **common, **ours}
    torch.testing.assert_close(
        trained("RMSprop", random_starts(), **options), param.detach(), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("centered", [False, True], ids=["", "centered"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_keras(momentum, centered, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("keras runs on another backend")
    lr = 2**-7  # exact in fp32, as keras keeps it
    param = keras.Variable(random_starts().numpy(), dtype="float64")
    theirs = keras.optimizers.RMSprop(lr, 0.9, momentum, epsilon=1e-3, centered=centered)
    for _ in range(STEPS):
        at = param.value.detach().clone().requires_grad_()
        valley(at).backward()
        theirs.apply([at.grad], [param])
    options: dict[str, Any] = {"lr": lr, "alpha": 0.9, "eps": 1e-3, "centered": centered}
    if momentum:
        options.update(momentum=momentum, lr_in_momentum=True)
    ours = trained("RMSprop", random_starts(), eps_in_sqrt=True, **options)
    torch.testing.assert_close(ours, param.value.detach().cpu(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias_correction", [False, True], ids=["", "bias correction"])
@pytest.mark.parametrize("nesterov", [None, False, True], ids=["", "momentum", "nesterov"])
@pytest.mark.parametrize("eps_in_sqrt", [False, True], ids=["", "eps in sqrt"])
@pytest.mark.parametrize("centered", [False, True], ids=["", "centered"])
def test_optax(centered, eps_in_sqrt, nesterov, bias_correction):
    # Its RMSprop only: optax 0.2.8 emits in every Rprop step the update of the step before, against
    # its own documentation. Rprop is tested against the formula.
    optax = pytest.importorskip("optax")
    jax = pytest.importorskip("jax")
    numpy = pytest.importorskip("numpy")
    common = {
        "eps": 1e-3,
        "centered": centered,
        "eps_in_sqrt": eps_in_sqrt,
        "bias_correction": bias_correction,
        "initial_scale": 0.25,  # a variance of 0 but for rounding would differ
    }
    momentum = {} if nesterov is None else {"momentum": 0.9, "nesterov": nesterov}
    with jax.enable_x64(True):
        param = jax.numpy.asarray(random_starts().numpy())
        theirs = optax.rmsprop(0.01, 0.9, **common, **momentum)
        state = theirs.init(param)
        for _ in range(STEPS):
            at = torch.tensor(numpy.asarray(param), requires_grad=True)
            valley(at).backward()
            updates, state = theirs.update(jax.numpy.asarray(at.grad.numpy()), state)
            param = optax.apply_updates(param, updates)
        expected = torch.tensor(numpy.asarray(param))
    if momentum:
        momentum["lr_in_momentum"] = True
    ours = trained("RMSprop", random_starts(), lr=0.01, alpha=0.9, **common, **momentum)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
