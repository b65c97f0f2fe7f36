"""The ops in half precision: remainders, and stochastic rounding; eager, compiled, as classes."""

import pytest
import torch
from compile_cases import fresh  # noqa: F401
from torch.library import opcheck

import tritonopt
from tritonopt.device import path
from tritonopt.precision import joined

pytestmark = pytest.mark.usefixtures("fresh")
OPS = torch.ops.tritonopt
CLASSES = {"rmsprop_": tritonopt.RMSprop, "rprop_": tritonopt.Rprop}
SHAPES = [(3, 5), (7,), (300,)]
STATE = {"rmsprop_": ["square_avg"], "rprop_": ["prev", "step_size"]}
STOCHASTIC = {"stochastic_rounding": True, "rounding_seed": 3}


def arguments(name, is_split):
    """As the first step leaves them, with remainders of all bits."""
    params, grads = ([torch.randn(s).bfloat16() for s in SHAPES] for _ in range(2))
    kind = torch.float32 if is_split else torch.bfloat16
    states = [[torch.rand(s).to(kind) / 8 for s in SHAPES] for _ in STATE[name]]
    unused = [[], []] if name == "rmsprop_" else []
    steps = [torch.zeros(()) for _ in SHAPES]
    remainders = [torch.randint(-(2**15), 2**15 - 1, s, dtype=torch.int16) for s in SHAPES]
    return [params, grads, *states, *unused, steps, *([remainders] if is_split else [])]


def copies(lists):
    return [[tensor.clone() for tensor in column] for column in lists]


def equal(left, right):
    return all(map(torch.equal, sum(left, []), sum(right, [])))


def step(name, lists, **options):
    getattr(OPS, name)(*lists, **options)


BOTH = pytest.mark.parametrize(
    "is_split, options", [(True, {}), (False, STOCHASTIC)], ids=["split", "stochastic"]
)


@BOTH
@pytest.mark.parametrize("name", CLASSES)
def test_opcheck(name, is_split, options):
    opcheck(getattr(OPS, name).default, arguments(name, is_split), options)


@BOTH
@pytest.mark.parametrize("name", CLASSES)
def test_compiled(name, is_split, options):
    before = arguments(name, is_split)
    eager, compiled = copies(before), copies(before)
    run = torch.compile(step, fullgraph=True)
    for _ in range(2):
        step(name, eager, **options)
        run(name, compiled, **options)
    assert equal(eager, compiled) and not equal(eager, before)


@BOTH
@pytest.mark.parametrize("name", CLASSES)
def test_as_the_class(name, is_split, options):
    lists = arguments(name, is_split)
    params = [torch.nn.Parameter(param.clone()) for param in lists[0]]
    optimizer = CLASSES[name](params, **({"master": "split"} if is_split else options))
    for index, (param, grad) in enumerate(zip(params, lists[1], strict=True)):
        entry = {key: lists[2 + i][index].clone() for i, key in enumerate(STATE[name])}
        entry["step"] = torch.zeros(())
        if is_split:
            entry["remainder"] = lists[-1][index].clone().view(torch.bfloat16)
        optimizer.state[param], param.grad = entry, grad
    for _ in range(3):
        step(name, lists, **options)
        optimizer.step()
    assert equal([lists[0]], [[param.detach() for param in params]])
    for index, param in enumerate(params):
        for number, key in enumerate(STATE[name]):
            assert torch.equal(lists[2 + number][index], optimizer.state[param][key])
        if is_split:
            whole = joined(param.detach(), optimizer.state[param]["remainder"])
            assert torch.equal(joined(lists[0][index], lists[-1][index]), whole)


REFUSED = [
    (True, STOCHASTIC, "none that is rounded"),
    (False, {"rounding_seed": 3}, "requires stochastic_rounding"),
    (False, {**STOCHASTIC, "rounding_seed": -1}, "Invalid rounding_seed"),
]


@pytest.mark.parametrize("is_split, options, match", REFUSED, ids=str)
def test_refused(is_split, options, match):
    with pytest.raises(ValueError, match=match):
        step("rprop_", arguments("rprop_", is_split), **options)


def test_lists_that_do_not_fit():
    lists = arguments("rprop_", True)
    with pytest.raises(ValueError, match="a remainder for every parameter"):
        step("rprop_", [*lists[:-1], lists[-1][:2]])
    with pytest.raises(ValueError, match="remainders of int16"):
        step("rprop_", [*lists[:-1], lists[0]])
    with pytest.raises(ValueError, match="state_steps for random bits"):
        step("rprop_", [*lists[:4], []], **STOCHASTIC)
    assert path(torch.device("cpu"))[0] == "eager" and not any(map(float, lists[4]))
