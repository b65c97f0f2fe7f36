"""Every rule of the family equals its formula, on each path."""

from __future__ import annotations

import itertools
from typing import Any

import formulas
import pytest
import torch
from torch import Tensor
from variant_cases import (
    COMBINATIONS,
    ON_BOTH_PATHS,
    STEPS,
    VARIANTS,
    WIDTH,
    random_starts,
    trained,
    valley,
)

import tritonopt
from tritonopt import eager
from tritonopt.device import INTERPRET
from tritonopt.sweep import Sweep

ROWS = [
    row if row in ON_BOTH_PATHS else pytest.param(*row.values, id=row.id, marks=pytest.mark.slow)
    for row in COMBINATIONS
]


def of_numbers(w: list[float]) -> tuple[float, list[float]]:
    at = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    loss = valley(at.view(-1, WIDTH))
    loss.backward()
    assert at.grad is not None
    return float(loss.detach()), at.grad.tolist()


# Against the formulas.


@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rprop_formula(variant, maximize):
    options = {"variant": variant, "maximize": maximize, "lr": 0.1, "step_sizes": (1e-4, 0.5)}
    starts = random_starts()[:3]
    for start in starts:  # one at a time: the loss of each decides in irprop+
        ours = trained("Rprop", start, **options)
        expected = formulas.rprop(start.tolist(), of_numbers, STEPS, **options)
        assert ours.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_variants_differ():
    start = random_starts()[0]
    results = [tuple(trained("Rprop", start, variant=v, lr=0.1).tolist()) for v in VARIANTS]
    assert len(set(results)) == len(VARIANTS)


@pytest.mark.parametrize("options", ON_BOTH_PATHS if INTERPRET else ROWS)
def test_rmsprop_formula(options):
    # Far from the minimum: near it, dividing by the root of a vanished average amplifies rounding.
    options = {"lr": 0.001, "alpha": 0.9, "eps": 1e-3, **options}
    rounding = 1e-9
    if "centered" in options and "bias_correction" in options and "initial_scale" not in options:
        options["eps"], rounding = 1.0, 1e-5  # the root of a variance that is 0 but for rounding
    starts = random_starts()  # elements are independent: one parameter holds all starts
    ours = trained("RMSprop", starts, **options).flatten().tolist()
    expected = formulas.rmsprop(starts.flatten().tolist(), of_numbers, STEPS, **options)
    assert ours == pytest.approx(expected, rel=rounding, abs=rounding)


# One path against the other.


def twice(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


@pytest.mark.skipif(not INTERPRET, reason="the kernels run where they are interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss_rose", [False, True], ids=["fell", "rose"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rprop_kernel_has_the_bits_of_the_eager_rule(variant, loss_rose, dtype):
    from tritonopt.kernels import launch

    sizes = (1025, 7)
    params, grads, prevs = ([torch.randn(n, dtype=dtype) for n in sizes] for _ in range(3))
    step_sizes = [torch.rand(n, dtype=dtype) for n in sizes]
    hyper = {"etaminus": 0.5, "etaplus": 1.2, "step_size_min": 0.1, "step_size_max": 0.9}
    hyper |= {"maximize": True, "variant": variant, "loss_rose": loss_rose}
    results = []
    for update in (Sweep, launch.Launch):
        rule = eager.rprop_ if update is Sweep else launch.rprop_
        tensors = twice(params), twice(prevs), twice(step_sizes)
        update(rule, tensors[0], list(tensors[1:]))(grads, hyper)
        results.append(list(itertools.chain(*tensors)))
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


@pytest.mark.skipif(not INTERPRET, reason="the kernels run where they are interpreted")
@pytest.mark.parametrize("options", ON_BOTH_PATHS)
def test_rmsprop_kernel_is_near_the_eager_rule(options, monkeypatch):
    """Within a few ulp: on a CPU torch's own square root is off by one for one number in five."""
    results = []
    for path in ("eager", "kernel"):
        torch.manual_seed(1)
        params = [torch.nn.Parameter(torch.randn(n)) for n in (1025, 7)]
        optimizer = tritonopt.RMSprop(params, eps=1e-3, **options)
        with monkeypatch.context() as patch:
            if path == "eager":
                patch.setattr("tritonopt.plan.path", lambda device: ("eager", "eager"))
            for _ in range(3):
                for param in params:
                    param.grad = torch.randn_like(param)
                optimizer.step()
        state = [value for p in params for value in optimizer.state[p].values()]
        results.append([*(p.detach() for p in params), *state])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=2e-6, atol=2e-6)


# Bias correction counts the steps of every parameter.


@pytest.mark.parametrize("sizes", [(3, 5, 2, 4), (3, 300_000, 2, 4)], ids=["span", "alone"])
def test_different_step_counts(sizes):
    params = [torch.nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in sizes]
    optimizer = tritonopt.RMSprop(params, alpha=0.9, bias_correction=True)
    expected = [1.0] * len(params)
    averages, counts = [0.0] * len(params), [0] * len(params)
    for step in range(12):
        for index, param in enumerate(params):
            given = index == 0 or step % (index + 1) == 0
            param.grad = torch.full_like(param, step + 1.0) if given else None
            if given:
                counts[index] += 1
                averages[index] = 0.9 * averages[index] + 0.1 * (step + 1.0) ** 2
                average = averages[index] / (1 - 0.9 ** counts[index])
                expected[index] -= 0.01 * (step + 1.0) / (average**0.5 + 1e-8)
        optimizer.step()
    assert len(set(counts)) == len(params)
    for param, value in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach(), torch.full_like(param, value))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts on the device are a GPU's")
def test_counts_on_the_device():
    results = []
    for capturable in (False, True):
        params = [torch.nn.Parameter(torch.ones(n, device="cuda")) for n in (3, 2000)]
        options: Any = {"bias_correction": True, "capturable": capturable}
        optimizer = tritonopt.RMSprop(params, alpha=0.9, **options)
        for step in range(5):
            params[0].grad = torch.full_like(params[0], step + 1.0)
            params[1].grad = torch.full_like(params[1], step + 2.0) if step % 2 else None
            optimizer.step()
        results.append([p.detach() for p in params])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=0)


def test_initial_scale_survives_a_cast_before_the_first_step():
    model = torch.nn.Linear(3, 2)
    optimizer = tritonopt.RMSprop(model.parameters(), initial_scale=0.5)
    model.double()(torch.ones(1, 3).double()).sum().backward()
    optimizer.step()
    average = optimizer.state[model.weight]["square_avg"]
    torch.testing.assert_close(average, torch.full_like(average, 0.99 * 0.5 + 0.01))
