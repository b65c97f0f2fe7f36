"""The ops against the eager rule: opcheck, any plain tensors, clear errors, no leaks."""

import gc
import weakref

import pytest
import torch
from cases import TORCH
from torch.library import opcheck
from torch.optim.rmsprop import rmsprop
from torch.optim.rprop import rprop

from tritonopt import ops
from tritonopt.device import path

OPS = torch.ops.tritonopt


def arguments(name, shapes=((3, 5), (7,)), dtype=torch.float32, device="cpu", grad=False):
    """The positional arguments of an op; every list of state in use."""

    def some():
        return [torch.randn(s, dtype=dtype, device=device) for s in shapes]

    params = [p.requires_grad_(grad) for p in some()]
    if name == "rmsprop_":
        states = [[t.square() + 1 for t in some()], [t / 10 for t in some()], some()]
    else:
        states = [some(), [t.abs() + 0.1 for t in some()]]
    return [params, some(), *states, [torch.zeros((), device=device) for _ in shapes]]


def copy(arguments):
    return [[t.detach().clone() for t in column] for column in arguments]


def stock_step(name, arguments, **hyper):
    """The same step by torch's for-loop on the same tensors."""
    params, grads, *states, steps = arguments
    if name == "rmsprop_":
        square_avgs, grad_avgs, momentum_buffers = states
        hyper = {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0, "momentum": 0} | hyper
        rmsprop(
            params, grads, square_avgs, grad_avgs, momentum_buffers, steps,
            foreach=False, centered=bool(grad_avgs), **hyper,
        )  # fmt: skip
    else:
        limits = {"etaminus": 0.5, "etaplus": 1.2, "step_size_min": 1e-6, "step_size_max": 50}
        rprop(*arguments, foreach=False, **limits | hyper)


def step(name, arguments, **hyper):
    with torch.no_grad():
        getattr(OPS, name)(*arguments, **hyper)


HYPER = {"rmsprop_": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, "rprop_": {}}
NAMES = sorted(HYPER)


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "requires_grad"])
@pytest.mark.parametrize(
    "overload",
    ["rmsprop_.default", "rmsprop_.tensor_lr", "rmsprop_.tensor_hyper", "rprop_.default"],
)
def test_opcheck(overload, grad, device):
    name, _, kind = overload.partition(".")
    hyper = HYPER[name]
    if kind == "tensor_lr":
        hyper = {**hyper, "lr": torch.tensor(0.1, device=device)}
    if kind == "tensor_hyper":
        values = {"lr": 0.1, "alpha": 0.9, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.9}
        hyper = {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
    opcheck(getattr(getattr(OPS, name), kind), arguments(name, device=device, grad=grad), hyper)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shapes",
    [[()], [(0,), (3,), (0, 2)], [(2, 3)] * 3, [(5,)] * 40, [(n,) for n in range(0, 600, 13)]],
    ids=["scalar", "empty", "three", "forty", "many sizes"],
)
def test_equals_torch(name, shapes, dtype):
    ours = arguments(name, shapes, dtype)
    theirs = copy(ours)
    for _ in range(3):
        step(name, ours, **HYPER[name])
        stock_step(name, theirs, **HYPER[name])
    exact = path(torch.device("cpu"))[0] == "eager"
    rtol, atol = (0, 0) if exact else (1e-5, 1e-6)
    for left, right in zip(sum(ours, []), sum(theirs, []), strict=True):
        torch.testing.assert_close(left, right, rtol=rtol, atol=atol)


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every other": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "view of a larger": lambda t: torch.cat([t, t])[1 : 1 + len(t)].copy_(t),
}


@pytest.mark.parametrize("who", ["all", "param", "grad", "state"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_any_strides(name, layout, who):
    ours = arguments(name, [(3, 5), (4, 2)])
    theirs = copy(ours)
    for number in {"all": range(len(ours) - 1), "param": [0], "grad": [1], "state": [2]}[who]:
        ours[number] = [LAYOUTS[layout](t) for t in ours[number]]
    step(name, ours, **HYPER[name])
    stock_step(name, theirs, **HYPER[name])
    for left, right in zip(sum(ours, []), sum(theirs, []), strict=True):
        torch.testing.assert_close(left, right, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_dtypes_in_one_call(name):
    kinds = [arguments(name, dtype=d) for d in (torch.float32, torch.float64, torch.bfloat16)]
    ours = [sum(columns, []) for columns in zip(*kinds, strict=True)]
    theirs = copy(ours)
    step(name, ours, **HYPER[name])
    stock_step(name, theirs, **HYPER[name])
    for left, right in zip(sum(ours, []), sum(theirs, []), strict=True):
        half = left.dtype == torch.bfloat16  # torch rounds every operation, the op once
        rtol, atol = (2e-2, 1e-2) if half else (2e-6, 1e-7)
        torch.testing.assert_close(left, right, rtol=rtol, atol=atol)


def test_overlapping_parameters_one_after_the_other():
    base = torch.randn(8)
    ours = [[base[:6], base[2:]], [torch.ones(6), torch.ones(6)]]
    ours += [[torch.zeros(6), torch.zeros(6)], [], [], []]
    theirs = base.clone()
    for view in (theirs[:6], theirs[2:]):
        step("rmsprop_", [[view], [torch.ones(6)], [torch.zeros(6)], [], [], []])
    step("rmsprop_", ours)
    assert torch.equal(base, theirs)


def test_every_tensor_has_a_count_of_its_own():
    """Also where many small ones are updated together."""
    ours = arguments("rmsprop_", [(5,)] * 8)
    ours[3] = []  # not centered
    for number, count in enumerate(ours[-1]):
        count.fill_(number)
    theirs = copy(ours)
    step("rmsprop_", ours, bias_correction=True, momentum=0.9)
    for number in range(8):
        alone = [column[number : number + 1] for column in theirs]
        step("rmsprop_", alone, bias_correction=True, momentum=0.9)
    for left, right in zip(sum(ours, []), sum(theirs, []), strict=True):
        assert torch.equal(left, right)


def test_versions_are_bumped():
    arg = arguments("rprop_")
    before = [p._version for p in arg[0]]
    step("rprop_", arg)
    assert all(p._version > v for p, v in zip(arg[0], before, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda a: a[1].pop(), ValueError, "equal lengths"),
        (lambda a: a[2].clear(), ValueError, "state for every parameter"),
        (lambda a: a[2].__setitem__(1, a[2][0].view(-1)[:7]), ValueError, "shares memory"),
        (lambda a: a[5].__setitem__(1, a[5][0]), ValueError, "shares memory"),
        (lambda a: a[1].__setitem__(0, torch.ones(2)), ValueError, "size of parameter 0"),
        (lambda a: a[1].__setitem__(1, a[1][1].double()), NotImplementedError, "mixes dtypes"),
        (lambda a: a[1].__setitem__(1, a[1][1].to_sparse()), NotImplementedError, "Sparse"),
        (lambda a: a[0].__setitem__(1, a[0][1].cfloat()), NotImplementedError, "complex64"),
    ],
    ids=["lengths", "no state", "one state", "one count", "size", "dtypes", "sparse", "complex"],
)
def test_errors_before_anything_is_written(change, error, text):
    arg = arguments("rmsprop_")
    before = copy(arg)
    change(arg)
    with pytest.raises(error, match=text):
        step("rmsprop_", arg)
    assert torch.equal(arg[0][0], before[0][0])


def test_bias_correction_needs_every_count():
    arg = arguments("rmsprop_")
    before = copy(arg)
    arg[5].pop()
    with pytest.raises(ValueError, match="one for each parameter"):
        step("rmsprop_", arg, bias_correction=True)
    assert torch.equal(arg[0][0], before[0][0]) and torch.equal(arg[5][0], before[5][0])


@pytest.mark.parametrize(
    ("name", "option", "text"),
    [
        ("rmsprop_", {"momentum": 0.9}, "momentum_buffers for momentum"),
        ("rmsprop_", {"nesterov": True}, "momentum_buffers for nesterov"),
        ("rmsprop_", {"lr_in_momentum": True}, "momentum_buffers for lr_in_momentum"),
        ("rmsprop_", {"bias_correction": True}, "state_steps for bias_correction"),
        ("rprop_", {"variant": "bogus"}, "invalid variant 'bogus'"),
    ],
    ids=str,
)
def test_options_that_could_have_no_effect(name, option, text):
    ones, zeros = torch.ones(3), torch.zeros(3)
    states = [[zeros], [], [], []] if name == "rmsprop_" else [[zeros], [zeros.clone()], []]
    with pytest.raises(ValueError, match=text):
        getattr(torch.ops.tritonopt, name)([ones], [ones.clone()], *states, **option)
    assert torch.equal(ones, torch.ones(3)) and not zeros.any()


@pytest.mark.parametrize("what", ["grad", "state", "lr"])
def test_compiled_what_is_written_shares_memory_with_nothing_else(what):
    """A graph keeps no order of writes. Side by side in one memory is another thing."""

    def step(memory):
        param, state, grad, lr = memory.split([4, 4, 4, 1])
        shared = memory[3:7]
        OPS.rmsprop_(
            [param], [shared if what == "grad" else grad], [shared if what == "state" else state],
            [], [], [], lr=shared[0] if what == "lr" else lr,
        )  # fmt: skip

    with pytest.raises(Exception, match="may share memory with no other input"):
        torch.compile(step, backend="aot_eager")(torch.ones(13))


def test_compiled_pieces_of_one_memory():
    def step(memory):
        param, state, grad, lr = memory.split([4, 4, 4, 1])
        OPS.rmsprop_([param], [grad], [state], [], [], [], lr=lr)

    ours, theirs = torch.ones(13), torch.ones(13)
    torch.compile(step, backend="aot_eager", fullgraph=True)(ours)
    step(theirs)
    torch.testing.assert_close(ours, theirs)


def test_moved_tensors_are_updated_where_they_lie():
    arg = arguments("rprop_", [(64,)] * 20)
    step("rprop_", arg)
    old = [p.clone() for p in arg[0]]
    for p in arg[0]:
        p.data = p.data.clone()
    arg[2] = [t.clone() for t in arg[2]]
    theirs = copy(arg)
    step("rprop_", arg)
    stock_step("rprop_", theirs)
    assert all(torch.equal(a, b) for a, b in zip(arg[0], theirs[0], strict=True))
    assert not torch.equal(arg[0][0], old[0])


def test_nothing_outlives_its_tensors():
    gc.collect()
    before = len(ops._plans)
    arg = arguments("rprop_")
    step("rprop_", arg)
    assert len(ops._plans) == before + 1
    del arg
    gc.collect()
    assert len(ops._plans) == before


@pytest.mark.parametrize("name", NAMES)
def test_memory_of_what_has_moved_or_is_gone_is_released(name):
    params, grads, *states, steps = arguments(name, [(100, 100)] * 6)

    step(name, [params, grads, *states, steps])
    plans = weakref.WeakSet(plan for plan, *_ in ops._plans[states[0][0]])
    for p in params:
        p.data = p.data.clone()
    step(name, [params, grads, *states, steps])
    gc.collect()
    assert len(plans) == 0  # of the place where they were
    plans.update(plan for plan, *_ in ops._plans[states[0][0]])
    assert len(plans) == 1
    del states  # the optimizer is gone, the model stays
    gc.collect()
    assert len(plans) == 0


def test_state_of_stock_optimizers(device):
    """Without the classes: on what torch.optim made."""
    params = [torch.nn.Parameter(torch.randn(4, device=device)) for _ in range(2)]
    optimizer = TORCH["Rprop"](params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    states = [optimizer.state[p] for p in params]
    columns = [[s[key] for s in states] for key in ("prev", "step_size", "step")]
    step("rprop_", [params, [p.grad for p in params], *columns])
    assert all(float(s["step"]) == 2 for s in states)
