"""Whatever else is in the graph of a stock update, the result is eager's."""

import re

import pytest
import torch
from compile_cases import HYPER, complex_parameters, fresh, lists, reporting, skip_interpreted
from torch.optim.rmsprop import rmsprop
from torch.optim.rprop import rprop

__all__ = ["fresh"]  # an autouse fixture
pytestmark = skip_interpreted


ETAS = {"etaminus": 0.5, "etaplus": 1.2, "step_size_min": 1e-6, "step_size_max": 50.0}


def read_before_and_after(p, g, v, s, n):
    before = sum(t.sum() for t in p)
    rmsprop(p, g, v, [], [], n, foreach=True, **HYPER)
    return before, sum((t * 3).sum() for t in p)


def clip_then_zero(p, g, v, s, n):
    norm = torch.stack([t.norm() for t in g]).norm()
    torch._foreach_mul_(g, 1 / (norm + 1))
    rmsprop(p, g, v, [], [], n, foreach=False, **HYPER)
    for t in g:
        t.zero_()
    return (norm,)


def computed_gradients(p, g, v, s, n):
    gradients = [(t * t + t).cos() * 0.5 for t in p]
    rmsprop(p, gradients, v, [], s, n, foreach=False, **{**HYPER, "momentum": 0.9})
    return ()


def model_and_step(p, g, v, s, n):
    loss = torch.nn.functional.linear(g[0], p[0]).relu().sum()
    with torch.no_grad():
        rmsprop(p, g, v, [], [], n, foreach=False, **HYPER)
    return (loss,)


def returns_parameter(p, g, v, s, n):
    rmsprop(p, g, v, [], [], n, foreach=False, **HYPER)
    return (p[0] * 1,)


def returns_copies(p, g, v, s, n):
    rmsprop(p, g, v, [], [], n, foreach=False, **HYPER)
    return [p[0].clone(), v[1].repeat(1, 1), torch.cat([p[2]])]


def masks(p, g, v, s, n):
    rprop(p, g, s, v, n, foreach=False, capturable=False, **ETAS)
    return ()


def masks_foreach(p, g, v, s, n):
    rprop(p, g, s, v, n, foreach=True, capturable=False, maximize=True, **ETAS)
    return ()


def two_groups(p, g, v, s, n):
    rmsprop(p[:1], g[:1], v[:1], [], [], n[:1], foreach=True, **HYPER)
    rmsprop(p[1:], g[1:], v[1:], [], [], n[1:], foreach=True, **{**HYPER, "lr": 0.1})
    return ()


def gradients_through_int8(p, g, v, s, n):
    through = []
    for t in g:
        small = torch.empty(t.size(), dtype=torch.int8).copy_(t * 3)
        through.append(torch.empty(t.size()).copy_(small))
    rmsprop(p, through, v, [], [], n, foreach=False, **HYPER)
    return ()


def gradient_broadcast(p, g, v, s, n):
    rows = [torch.empty(t.size()).copy_(t[0]) for t in g]
    rmsprop(p, rows, v, [], [], n, foreach=False, **HYPER)
    return ()


def state_rounded(p, g, v, s, n):
    for t in v:
        whole = torch.empty(t.size(), dtype=torch.int64)
        whole.copy_(t)
        t.copy_(whole)
    rmsprop(p, g, v, [], [], n, foreach=False, **HYPER)
    return ()


def averaged_before(p, g, v, s, n):
    for average, parameter, state in zip(s, p, v, strict=True):
        average.lerp_(parameter, 0.5)
        average[0].add_(state[1])
    rmsprop(p, g, v, [], [], n, foreach=False, **HYPER)
    return ()


def twice(p, g, v, s, n):
    for _ in range(2):
        rmsprop(p, g, v, [], [], n, foreach=True, **HYPER)
    return ()


def views(p, g, v, s, n):
    flat = [[t.view(-1) for t in column] for column in (p, g, v)]
    rmsprop(*flat, [], [], n, foreach=False, **HYPER)
    return ()


def state_is_shared(p, g, v, s, n):
    rmsprop(p, g, [v[0]] * 3, [], [], n, foreach=False, **HYPER)
    return ()


def written_again(p, g, v, s, n):
    rmsprop(p, g, v, [], [], n, foreach=False, **HYPER)
    for t in (*p, *v):
        t.mul_(2)
    return ()


def sgd(p, g, v, s, n):
    torch._foreach_add_(p, g, alpha=-0.1)
    return ()


def gradient_is_state(p, g, v, s, n):
    rmsprop(p, v, v, [], [], n, foreach=False, **HYPER)
    return ()


def gradient_of_float64(p, g, v, s, n):
    rmsprop(p, [t.double() for t in g], v, [], [], n, foreach=False, **HYPER)
    return ()


def read_between_two(p, g, v, s, n):
    rmsprop(p[:1], g[:1], v[:1], [], [], n[:1], foreach=False, **HYPER)
    between = p[0].sum()
    rmsprop(p[1:], g[1:], v[1:], [], [], n[1:], foreach=False, **HYPER)
    return (between,)


REPLACED = {
    averaged_before: 3, read_before_and_after: 3, clip_then_zero: 3, computed_gradients: 3,
    model_and_step: 3, returns_parameter: 3, returns_copies: 3, masks: 3, masks_foreach: 3,
    two_groups: 3, twice: 6, views: 3, written_again: 3, read_between_two: 3,
    gradients_through_int8: 3, gradient_broadcast: 3, state_rounded: 3,
}  # fmt: skip
LEFT = {
    complex_parameters: "it is of torch.complex64",
    state_is_shared: "it writes to a memory twice",
    gradient_of_float64: "it mixes dtypes or devices",
    gradient_is_state: "a gradient is a parameter's memory, or its state's",
    sgd: None,
}


FAST = [masks, two_groups]
GROUPS = [
    *([function] for function in FAST),
    *(
        pytest.param([f for f in table if f not in FAST], marks=pytest.mark.slow)
        for table in (REPLACED, LEFT)
    ),
]


@pytest.mark.parametrize("functions", GROUPS, ids=lambda some: some[0].__name__)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_graphs(functions):
    """Several functions are one graph, as Inductor takes seconds for each."""

    def all_of_them(*given):
        return [function(*columns) for function, columns in zip(functions, given, strict=True)]

    ours, theirs = ([lists() for _ in functions] for _ in range(2))
    compiled, reports = reporting(all_of_them, fullgraph=True)
    results = compiled(*ours)
    expected = all_of_them(*theirs)
    memory = {t.data_ptr() for columns in ours for column in columns for t in column}
    assert memory.isdisjoint(t.data_ptr() for result in results for t in result)
    for function, *both in zip(functions, ours, theirs, results, expected, strict=True):
        for left, right in (both[:2], map(list, both[2:])):
            torch.testing.assert_close(
                left, right, rtol=1e-5, atol=1e-6,
                msg=lambda text, function=function: f"{function.__name__}: {text}",
            )  # fmt: skip
    (report,) = reports
    counts = re.findall(r"replaced: \w+ of (\d+) parameters", report)
    assert sum(map(int, counts)) == sum(REPLACED.get(f, 0) for f in functions), report
    reasons = [LEFT[function] for function in functions if LEFT.get(function)]
    assert re.findall("left to Inductor: rmsprop, as (.*)", report) == reasons, report


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    compiled, reports = reporting(masks, fullgraph=True)
    ours, theirs = lists(dtype), lists(dtype)
    compiled(*ours), masks(*theirs)
    tolerance = {"rtol": 3e-2, "atol": 1e-2} if dtype.itemsize == 2 else {"rtol": 1e-12, "atol": 0}
    for left, right in zip(sum(ours, []), sum(theirs, []), strict=True):
        torch.testing.assert_close(left, right, **tolerance)
    assert "replaced:" in reports[0]


def test_a_scalar_that_autograd_has_saved_is_no_count():
    """Eagerly, and by Inductor, a backward notices that it was changed."""

    @torch.compile(backend="tritonopt")
    def fn(p, g, v, n, w):
        with torch.no_grad():
            rmsprop(p, g, v, [], [], n, foreach=False, **HYPER)
        saved = w.exp()
        saved += 1
        return saved * 2

    lists = [[torch.ones(3)] for _ in range(3)]
    with pytest.raises(Exception, match="modified by an inplace operation"):
        fn(*lists, [torch.zeros(())], torch.tensor(0.3, requires_grad=True)).backward()


@pytest.mark.slow
def test_what_autograd_differentiates_is_left():
    def gradient(fn):
        w = torch.arange(1.0, 6.0, requires_grad=True)
        fn(w, torch.ones(5)).backward()
        return w.grad

    def fn(w, g):
        p, average, step = w.sin(), torch.ones_like(w), torch.zeros(())
        rmsprop(
            [p], [g], [average], [], [], [step], foreach=False, differentiable=True, lr=0.1,
            alpha=0.9, eps=1e-8, weight_decay=1.0, momentum=0.0, centered=False,
        )  # fmt: skip
        return p.square().sum()

    torch.testing.assert_close(gradient(torch.compile(fn, backend="tritonopt")), gradient(fn))


def test_other_backends_trace_what_they_always_did():
    nodes = []

    def count(module, inputs):
        nodes.append(len(module.graph.nodes))
        assert not any("tritonopt" in str(node.target) for node in module.graph.nodes)
        return module

    torch.compile(read_between_two, backend=count)(*lists())
    assert nodes[0] > 20
