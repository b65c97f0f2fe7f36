"""`RMSprop(centered=True, nan_safe=True)`: a variance that rounding makes negative counts as 0."""

import pytest
import torch
from cases import SHAPES, assert_follows, give_gradients, parameters

import tritonopt


def twins(device="cpu", shapes=SHAPES, **options):
    params = parameters(shapes, device=device)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    options = {"centered": True, "eps": 0.1, **options}
    ours = tritonopt.RMSprop(params, nan_safe=True, **options)
    return ours, torch.optim.RMSprop(copies, foreach=False, **options), params, copies


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}], ids=str)
def test_torchs_rule_where_no_variance_is_negative(options, device):
    ours, theirs, params, copies = twins(device, **options)
    for _ in range(4):
        give_gradients(params, copies)
        ours.step()
        theirs.step()
        assert_follows(ours, theirs, params, copies)


@pytest.mark.parametrize("eps_in_sqrt", [False, True], ids=["", "eps in sqrt"])
@pytest.mark.parametrize("path", ["step", "compile()", "op"])
def test_a_constant_gradient(path, eps_in_sqrt, device):
    """In torch the root of what is left of the variance is NaN, sooner or later."""
    ours, theirs, params, copies = twins(device, [(50,)], alpha=0.5)
    ours.param_groups[0]["eps_in_sqrt"] = eps_in_sqrt
    if path == "compile()":
        ours.compile()
    constant = torch.linspace(-3, 3, 50, device=device)
    lists = (
        [params[0].detach().clone()],
        [constant],
        *([torch.zeros(50, device=device)] for _ in "vg"),
    )
    for _ in range(60):
        for param in (*params, *copies):
            param.grad = constant.clone()
        if path == "op":
            options = {"alpha": 0.5, "eps": 0.1, "eps_in_sqrt": eps_in_sqrt, "nan_safe": True}
            torch.ops.tritonopt.rmsprop_(*lists, [], [], **options)
        else:
            ours.step()
        theirs.step()
    (param,) = lists[0] if path == "op" else params
    assert copies[0].isnan().any() and param.isfinite().all()
    # Its variance tends to 0, and the update to gradient / eps, or its root.
    before, update = param.detach().clone(), constant / (0.1**0.5 if eps_in_sqrt else 0.1)
    if path == "op":
        torch.ops.tritonopt.rmsprop_(*lists, [], [], **options)
    else:
        ours.step()
    torch.testing.assert_close(before - param.detach(), 0.01 * update, rtol=3e-2, atol=1e-3)


def test_a_nan_stays_one():
    ours, _, params, _ = twins(shapes=[(3,)])
    params[0].grad = torch.tensor([1.0, torch.nan, 1.0])
    ours.step()
    assert params[0].isnan().tolist() == [False, True, False]


def test_it_needs_a_variance():
    param = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="nan_safe=True requires centered=True"):
        tritonopt.RMSprop([param], nan_safe=True)
    with pytest.raises(ValueError, match="needs grad_avgs for nan_safe"):
        lists = [torch.ones(3)], [torch.ones(3)], [torch.ones(3)]
        torch.ops.tritonopt.rmsprop_(*lists, [], [], [], nan_safe=True)
