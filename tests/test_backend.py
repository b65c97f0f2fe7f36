"""The backend: every stock configuration is recognised and equals eager; the rest is left alone."""

import contextlib
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from cases import TORCH
from torch.optim.rmsprop import rmsprop
from torch.optim.rprop import rprop

from tritonopt import backend
from tritonopt.device import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="nothing is compiled")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch.compiler.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


@contextlib.contextmanager
def listen():
    reports = backend.Explanation()
    backend._listeners.append(reports)
    try:
        yield reports
    finally:
        backend._listeners.remove(reports)


STOCK = [
    *[("RMSprop", kwargs) for kwargs in (
        {}, {"momentum": 0.9}, {"centered": True}, {"weight_decay": 0.1}, {"maximize": True},
        {"weight_decay": 0.1, "maximize": True}, {"momentum": 0.9, "centered": True},
        {"alpha": 0.5, "eps": 1e-3, "weight_decay": 1},
        {"momentum": 0.9, "centered": True, "weight_decay": 0.1, "maximize": True},
    )],
    *[("Rprop", kwargs) for kwargs in (
        {}, {"maximize": True}, {"etas": (0.1, 1.7), "step_sizes": (1e-3, 0.1)},
    )],
]  # fmt: skip


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
@pytest.mark.parametrize(("name", "kwargs"), STOCK, ids=str)
def test_stock_step(name, kwargs, foreach, tensor_lr, device):
    """Equal to eager over steps with a schedule, missing gradients and all of the state."""
    lr = torch.tensor(0.01, device=device) if tensor_lr else 0.01
    shapes = [(3, 5), (), (7,)]
    params = [torch.nn.Parameter(torch.randn(s, device=device)) for s in shapes]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    compiled = TORCH[name](params, lr=lr, foreach=foreach, **kwargs)
    eager = TORCH[name](copies, lr=lr, foreach=False, **kwargs)
    step = torch.compile(compiled.step, backend="tritonopt")
    with listen() as reports:
        for number in range(5):
            for index, (p, q) in enumerate(zip(params, copies, strict=True)):
                p.grad = None if (number, index) == (3, 1) else torch.randn_like(p)
                q.grad = None if p.grad is None else p.grad.clone()
            step()
            eager.step()
            for optimizer in (compiled, eager):
                optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.9
    assert reports and all(len(r.replaced) == 1 and not r.left for r in reports), str(reports)
    close = {"rtol": 2e-6, "atol": 1e-7, "check_device": False}  # torch.compile moves the counts
    for p, q in zip(params, copies, strict=True):
        torch.testing.assert_close(p, q, **close)
        for key, value in eager.state[q].items():
            torch.testing.assert_close(compiled.state[p][key], value, **close)


HYPER = {
    "lr": 0.01, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.0, "centered": False
}  # fmt: skip
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


def complex_parameters(p, g, v, s, n):
    lists = [[torch.view_as_complex(t) for t in column] for column in (p, g, v)]
    rmsprop(*lists, [], [], n, foreach=False, has_complex=True, **HYPER)
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


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    columns = [[torch.randn(4, 2, dtype=dtype) for _ in range(3)] for _ in range(4)]
    columns[2] = [t.square() for t in columns[2]]
    return [*columns, [torch.zeros(()) for _ in range(3)]]


@pytest.mark.parametrize(
    ("function", "expect"),
    {**REPLACED, **LEFT}.items(),
    ids=lambda x: getattr(x, "__name__", str(x)),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_graphs(function, expect):
    compiled = torch.compile(function, backend="tritonopt", fullgraph=True)
    ours, theirs = tensors(), tensors()
    with listen() as reports:
        result, expected = compiled(*ours), function(*theirs)
    for left, right in zip(sum(ours, []), sum(theirs, []), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    for left, right in zip(result, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    assert {t.data_ptr() for t in result}.isdisjoint(t.data_ptr() for t in sum(ours, []))
    (report,) = reports
    if function in REPLACED:
        assert sum(int(line.split()[2]) for line in report.replaced) == expect, str(report)
    else:
        assert report.left == ([f"rmsprop, as {expect}"] if expect else []), str(report)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    compiled = torch.compile(masks, backend="tritonopt", fullgraph=True)
    ours, theirs = tensors(dtype), tensors(dtype)
    with listen() as reports:
        compiled(*ours), masks(*theirs)
    tolerance = {"rtol": 3e-2, "atol": 1e-2} if dtype.itemsize == 2 else {"rtol": 1e-12, "atol": 0}
    for left, right in zip(sum(ours, []), sum(theirs, []), strict=True):
        torch.testing.assert_close(left, right, **tolerance)
    assert reports[0].replaced


def test_options_reach_inductor(monkeypatch):
    seen = []
    compile_fx = torch._inductor.compile_fx.compile_fx

    def spy(module, inputs, config_patches=None, **kwargs):
        seen.append(config_patches or {})
        return compile_fx(module, inputs, config_patches=config_patches, **kwargs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", spy)
    for kwargs in ({"mode": "max-autotune-no-cudagraphs"}, {"options": {"max_fusion_size": 3}}):
        torch._dynamo.reset()
        torch.compile(torch.sin, backend="tritonopt", **kwargs)(torch.ones(3))
    assert any(patches.get("max_autotune") for patches in seen)
    assert {"max_fusion_size": 3} in seen


def test_training_step_of_a_model():
    """Forward, backward and a stock step in one compiled function, against eager."""

    def train(model, optimizer, x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.5)
        run = torch.compile(train, backend="tritonopt") if compiled else train
        with listen() as reports:
            batches = [torch.randn(6, 4) for _ in range(4)]
            losses.append([float(run(model, optimizer, x).detach()) for x in batches])
    assert any(r.replaced for r in reports), str(reports)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)


def test_is_a_named_backend():
    assert "tritonopt" in torch._dynamo.list_backends()
    (point,) = entry_points(group="torch_dynamo_backends", name="tritonopt")
    assert point.load() is backend.tritonopt


def test_explain():
    params = [torch.nn.Parameter(torch.randn(3)) for _ in range(2)]
    for p in params:
        p.grad = torch.randn(3)
    text = str(backend.explain(torch.optim.RMSprop(params, momentum=0.9, foreach=True).step))
    assert "replaced: RMSprop of 2 parameters" in text and "momentum=0.9" in text
    text = str(backend.explain(torch.optim.SGD(params, foreach=True).step))
    assert "left to Inductor: no step of a stock RMSprop or Rprop" in text
    text = str(backend.explain(complex_parameters, *tensors()))
    assert "left to Inductor: rmsprop, as it is of torch.complex64" in text
    for p in params:
        p.grad = None
    assert "no graph" in str(backend.explain(torch.optim.RMSprop(params).step))


def test_is_imported_by_who_asks_for_it():
    code = (
        "import sys, tritonopt; assert 'tritonopt.compile' not in sys.modules;"
        "print(tritonopt.backend.explain.__name__, hasattr(tritonopt, 'nothing'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["explain", "False"]


@pytest.mark.parametrize("wrong", [{"mode": "bogus"}, {"options": {"bogus": 1}}], ids=str)
def test_wrong_options_of_inductor(wrong):
    """Also where nothing is left to it."""
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    step = torch.compile(torch.optim.RMSprop([param]).step, backend="tritonopt", **wrong)
    with pytest.raises(Exception, match="bogus"):
        step()
    assert torch.equal(param, torch.ones(3))


def test_a_smaller_last_batch():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.RMSprop(model.parameters())

    @torch.compile(backend="tritonopt")
    def train(x, y):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    for batch in (8, 8, 5):
        train(torch.randn(batch, 3), torch.randn(batch, 2))


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


def test_numbers_that_change_need_two_graphs():
    """Also those that a scheduler does not know."""
    ours, theirs = ([torch.nn.Parameter(torch.ones(3))] for _ in range(2))
    compiled, eager = torch.optim.RMSprop(ours), torch.optim.RMSprop(theirs, foreach=False)
    step = torch.compile(compiled.step, backend="tritonopt")
    with listen() as reports:
        for number in range(1, 6):
            for (p,), optimizer, go in ((ours, compiled, step), (theirs, eager, eager.step)):
                p.grad = torch.full((3,), float(number))
                group = optimizer.param_groups[0]
                group["lr"], group["weight_decay"] = number / 50, 0.1 / number
                go()
    torch.testing.assert_close(ours, theirs)
    assert len(reports) == 2 and all(r.replaced for r in reports)


def test_other_backends_trace_what_they_always_did():
    nodes = []

    def count(module, inputs):
        nodes.append(len(module.graph.nodes))
        assert not any("tritonopt" in str(node.target) for node in module.graph.nodes)
        return module

    torch.compile(read_between_two, backend=count)(*tensors())
    assert nodes[0] > 20
