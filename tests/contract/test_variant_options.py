"""Options of the variants: checkpoints, groups, what is refused and what is described."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from variant_cases import ON_BOTH_PATHS, VARIANTS, random_starts, train

import tritonopt

# Checkpoints.

EVERY_RULE = [
    *(pytest.param("Rprop", {"variant": v}, id=v) for v in VARIANTS),
    *(pytest.param("RMSprop", *row.values, id=row.id) for row in ON_BOTH_PATHS),
]


@pytest.mark.parametrize("name, options", EVERY_RULE)
def test_resumes_to_the_bit(name, options):
    first = torch.nn.Parameter(torch.randn(9))
    optimizer = getattr(tritonopt, name)([first], **options)
    train(optimizer, [first], 5)
    file = io.BytesIO()
    torch.save({"model": first.detach(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = torch.nn.Parameter(saved["model"])
    resumed = getattr(tritonopt, name)([second])
    resumed.load_state_dict(saved["optimizer"])
    copied = copy.deepcopy(optimizer)
    unpickled = pickle.loads(pickle.dumps(optimizer))
    train(optimizer, [first], 5)
    for other in (resumed, copied, unpickled):
        param = other.param_groups[0]["params"][0]
        train(other, [param], 5)
        assert torch.equal(param, first)


@pytest.mark.parametrize("name, options", EVERY_RULE)
def test_torch_loads_ours(name, options):
    ours, theirs = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = getattr(tritonopt, name)([ours], **options)
    train(optimizer, [ours], 2)
    stock = getattr(torch.optim, name)([theirs], momentum=0.9) if name == "RMSprop" else None
    stock = stock or torch.optim.Rprop([theirs])
    stock.load_state_dict(optimizer.state_dict())
    train(stock, [theirs], 2)
    assert stock.state[theirs]["step"] == 4


@pytest.mark.parametrize("name", ["RMSprop", "Rprop"])
def test_loads_torchs_and_older_ones(name):
    stock_param = torch.nn.Parameter(torch.ones(3))
    stock = getattr(torch.optim, name)([stock_param], foreach=False)
    train(stock, [stock_param], 2)
    state = copy.deepcopy(stock.state_dict())
    state["param_groups"][0]["foreach"] = None
    param = torch.nn.Parameter(stock_param.detach().clone())
    optimizer = getattr(tritonopt, name)([param])
    optimizer.load_state_dict(state)
    train(optimizer, [param], 2)
    train(stock, [stock_param], 2)
    assert torch.equal(param, stock_param)

    assert optimizer.param_groups[0].keys() == stock.param_groups[0].keys()
    copied = pickle.loads(pickle.dumps(optimizer))
    copied.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert copied.param_groups[1].keys() == stock.param_groups[0].keys()
    copied.step()


def test_irprop_plus_keeps_the_loss_in_the_group():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = tritonopt.Rprop([param], variant="irprop+")
    assert optimizer.param_groups[0]["last_loss"] is None
    optimizer.step(lambda: torch.tensor(2.5))
    assert optimizer.state_dict()["param_groups"][0]["last_loss"] == 2.5
    optimizer.step(lambda: 1.5)
    assert optimizer.param_groups[0]["last_loss"] == 1.5
    assert "last_loss" not in tritonopt.Rprop([param]).param_groups[0]


def test_variants_by_group():
    params = [torch.nn.Parameter(random_starts()[0].clone()) for _ in VARIANTS]
    groups = [{"params": [p], "variant": v} for p, v in zip(params, VARIANTS, strict=True)]
    optimizer = tritonopt.Rprop(groups, lr=0.1)
    alone = torch.nn.Parameter(random_starts()[0].clone())
    train(optimizer, params)
    train(tritonopt.Rprop([alone], lr=0.1, variant="rprop+"), [alone])
    assert torch.equal(params[2], alone)


# What is refused.


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("Rprop", {"variant": "rprop"}, "variant"),
        ("Rprop", {"variant": None}, "variant"),
        ("Rprop", {"variant": "rprop+", "differentiable": True}, "rprop.*differentiable=True"),
        ("Rprop", {"variant": "rprop-", "foreach": True}, "rprop-.*foreach=True"),
        ("Rprop", {"variant": "irprop+", "foreach": False}, "irprop.*foreach=False"),
        ("RMSprop", {"nesterov": True}, "nesterov=True requires a momentum"),
        ("RMSprop", {"lr_in_momentum": True}, "lr_in_momentum=True requires a momentum"),
        ("RMSprop", {"bias_correction": True, "alpha": 1.0}, "bias_correction=True .* alpha"),
        ("RMSprop", {"initial_scale": -1.0}, "initial_scale"),
        ("RMSprop", {"initial_scale": float("nan")}, "initial_scale"),
        ("RMSprop", {"eps_in_sqrt": True, "foreach": True}, "eps_in_sqrt=True.*foreach=True"),
        ("RMSprop", {"initial_scale": 1.0, "differentiable": True}, "initial_scale=1.0.*diff"),
        ("RMSprop", {"bias_correction": True, "foreach": False}, "bias_correction=True.*foreach"),
        ("RMSprop", {"decoupled_weight_decay": True, "foreach": True}, "decoupled_weight_decay"),
        ("RMSprop", {"nesterov": True, "momentum": 0.9, "foreach": True}, "nesterov=True.*for"),
    ],
    ids=str,
)
def test_refused(name, options, words):
    make = getattr(tritonopt, name)
    param, other = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.raises(ValueError, match=words):
        make([param], **options)
    with pytest.raises(ValueError, match=words):
        make([{"params": [param], **options}])
    optimizer = make([param])
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": [other], **options})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0].update(options)
    param.grad = torch.ones(3)
    for look in (lambda o: None, lambda o: o.describe(), lambda o: (o.compile(), o.describe())):
        look(optimizer)
        with pytest.raises(ValueError, match=words):
            optimizer.step(lambda: 1.0)
    assert torch.equal(param, torch.ones(3))


@pytest.mark.parametrize(
    "strange, why",
    [
        (torch.ones(3, dtype=torch.complex64), "complex64"),
        (torch.ones(6)[::2], "not dense"),
    ],
    ids=["complex", "not dense"],
)
@pytest.mark.parametrize(
    "name, options",
    [("Rprop", {"variant": "rprop+"}), ("RMSprop", {"eps_in_sqrt": True})],
    ids=["Rprop", "RMSprop"],
)
def test_refused_for_what_only_torch_takes(name, options, strange, why):
    plain, odd = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(strange)
    optimizer = getattr(tritonopt, name)([plain, odd], **options)
    plain.grad = torch.ones(3)
    optimizer.step()  # nothing to refuse yet
    before = plain.detach().clone()
    odd.grad = torch.ones_like(odd)
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*{why}"):
        optimizer.step()
    assert torch.equal(plain, before)
    assert optimizer.state[plain]["step"] == 1


LOSSES = {"None": None, "a dict": {"loss": 1.0}, "two": torch.ones(2)}


@pytest.mark.parametrize(
    "closure", [None, *[lambda loss=x: loss for x in LOSSES.values()]], ids=["no closure", *LOSSES]
)
def test_irprop_plus_needs_the_loss(closure):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = tritonopt.Rprop([param], variant="irprop+")
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"variant='irprop\+' needs the loss"):
        optimizer.step(closure)
    assert torch.equal(param, torch.ones(3)) and not optimizer.state


# What is described.


@pytest.mark.parametrize("name, options", EVERY_RULE)
def test_same_bytes_as_the_default_rule(name, options):
    param = torch.nn.Parameter(torch.zeros(256))
    states = 2 if name == "Rprop" else 1 + ("momentum" in options) + ("centered" in options)
    table = getattr(tritonopt, name)([param], **options).describe()
    assert table.splitlines()[1].split()[-1] == f"{256 * 4 * (3 + 2 * states):,}"


@pytest.mark.parametrize("when", ["turned on", "before a gradient"])
@pytest.mark.parametrize("option", ["nesterov", "eps_in_sqrt", "decoupled_weight_decay"])
def test_refused_for_a_complex_parameter_whenever_it_is_seen(option, when):
    params = [torch.nn.Parameter(torch.randn(3, dtype=d)) for d in (torch.float32, torch.complex64)]
    optimizer = tritonopt.RMSprop(params, momentum=0.9)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    if when == "before a gradient":
        params[1].grad = None
    optimizer.param_groups[0][option] = True
    if when == "before a gradient":
        optimizer.step()
        params[1].grad = torch.randn_like(params[1])
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    with pytest.raises(ValueError, match=option):
        optimizer.step()
    torch.testing.assert_close((params, optimizer.state_dict()["state"]), before, rtol=0, atol=0)
