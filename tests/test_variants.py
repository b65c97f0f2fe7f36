"""Every rule of the family: against its formula, its library, and the other path."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import itertools
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import formulas
import pytest
import torch
from torch import Tensor

import tritonopt
from tritonopt import eager
from tritonopt.device import INTERPRET
from tritonopt.sweep import Sweep

VARIANTS = ("irprop-", "rprop-", "rprop+", "irprop+")
NEW = VARIANTS[1:]

STARTS, WIDTH = 20, 4
STEPS = 50

MOMENTUM = {
    "": {},
    "momentum": {"momentum": 0.9},
    "lr in momentum": {"momentum": 0.9, "lr_in_momentum": True},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "nesterov, lr in momentum": {"momentum": 0.9, "nesterov": True, "lr_in_momentum": True},
}
DECAY = {
    "": {},
    "weight decay": {"weight_decay": 0.1},
    "decoupled decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
}
FLAGS = {
    "eps in sqrt": {"eps_in_sqrt": True},
    "bias correction": {"bias_correction": True},
    "centered": {"centered": True},
    "initial scale": {"initial_scale": 0.5},
}


def every_combination() -> list[Any]:
    rows = []
    for (momentum, a), (decay, b) in itertools.product(MOMENTUM.items(), DECAY.items()):
        for used in itertools.product((False, True), repeat=len(FLAGS)):
            names = [name for name, use in zip(FLAGS, used, strict=True) if use]
            options = {**a, **b}
            for name in names:
                options.update(FLAGS[name])
            title = ", ".join(filter(None, (momentum, decay, *names))) or "plain"
            rows.append(pytest.param(options, id=title))
    return rows


COMBINATIONS = every_combination()
ON_BOTH_PATHS = COMBINATIONS[::16] + COMBINATIONS[15::16] + COMBINATIONS[-17:-13]
"""Each momentum and decay with no flag and with all, and some between: interpreting is slow."""


def valley(w: Tensor) -> Tensor:
    """A curved valley of each start: Rosenbrock's function, scaled, and a bowl."""
    a, b = w[..., :-1], w[..., 1:]
    return (5 * (b - a**2) ** 2 + (1 - a) ** 2).sum() + 0.1 * w.square().sum()


def of_numbers(w: list[float]) -> tuple[float, list[float]]:
    at = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    loss = valley(at.view(-1, WIDTH))
    loss.backward()
    assert at.grad is not None
    return float(loss.detach()), at.grad.tolist()


def random_starts() -> Tensor:
    return torch.randn(STARTS, WIDTH, dtype=torch.float64, generator=torch.manual_seed(3))


def train(optimizer: Any, params: Any, steps: int = STEPS) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([valley(param) for param in params]).sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def trained(name: str, start: Tensor, steps: int = STEPS, **options: Any) -> Tensor:
    param = torch.nn.Parameter(start.clone())
    train(getattr(tritonopt, name)([param], **options), [param], steps)
    return param.detach()


# Against the formulas.


@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rprop_formula(variant, maximize):
    options = {"variant": variant, "maximize": maximize, "lr": 0.1, "step_sizes": (1e-4, 0.5)}
    starts = random_starts()[: 3 if INTERPRET else None]  # interpreting is slow
    for start in starts:  # one at a time: the loss of each decides in irprop+
        ours = trained("Rprop", start, **options)
        expected = formulas.rprop(start.tolist(), of_numbers, STEPS, **options)
        assert ours.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_variants_differ():
    start = random_starts()[0]
    results = [tuple(trained("Rprop", start, variant=v, lr=0.1).tolist()) for v in VARIANTS]
    assert len(set(results)) == len(VARIANTS)


@pytest.mark.parametrize("options", ON_BOTH_PATHS if INTERPRET else COMBINATIONS)
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


# Against the libraries.


def timm_rmsprop_tf(monkeypatch: pytest.MonkeyPatch) -> Any:
    """timm's class without timm's package, whose import needs torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("timm is not installed")
    root = Path(spec.submodule_search_locations[0])
    for name, folder in (("timm", root), ("timm.optim", root / "optim")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        monkeypatch.setitem(sys.modules, name, package)
    return importlib.import_module("timm.optim.rmsprop_tf").RMSpropTF


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
            optimizer.step()
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
    assert torch.equal(param, torch.ones(3))
    assert optimizer.state[param]["step"] == 0


# What is described.


@pytest.mark.parametrize("name, options", EVERY_RULE)
def test_same_bytes_as_the_default_rule(name, options):
    param = torch.nn.Parameter(torch.zeros(256))
    states = 2 if name == "Rprop" else 1 + ("momentum" in options) + ("centered" in options)
    table = getattr(tritonopt, name)([param], **options).describe()
    assert table.split()[-1] == f"{256 * 4 * (3 + 2 * states):,}"
