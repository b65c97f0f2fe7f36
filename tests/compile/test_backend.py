"""backend="tritonopt": every stock configuration is recognised and equals eager."""

import subprocess
import sys
from importlib.metadata import entry_points
from itertools import cycle

import pytest
import torch
from cases import TORCH
from compile_cases import complex_parameters, fresh, lists, reporting, skip_interpreted

from tritonopt import backend

__all__ = ["fresh"]  # an autouse fixture
pytestmark = skip_interpreted


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


ROWS = [
    pytest.param(*row, t, f, id=f"{row}-{t}-{f}", marks=[] if t == f else [pytest.mark.slow])
    for row, f in zip(STOCK, cycle((False, True)), strict=False)
    for t in (False, True)
]


@pytest.mark.parametrize(("name", "kwargs", "tensor_lr", "foreach"), ROWS)
def test_stock_step(name, kwargs, tensor_lr, foreach, device):
    """Equal to eager over steps with a schedule, missing gradients and all of the state."""
    lr = torch.tensor(0.01, device=device) if tensor_lr else 0.01
    shapes = [(3, 5), (), (7,)]
    params = [torch.nn.Parameter(torch.randn(s, device=device)) for s in shapes]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    compiled = TORCH[name](params, lr=lr, foreach=foreach, **kwargs)
    eager = TORCH[name](copies, lr=lr, foreach=False, **kwargs)
    step, reports = reporting(compiled.step)
    for number in range(5):
        for index, (p, q) in enumerate(zip(params, copies, strict=True)):
            p.grad = None if (number, index) == (3, 1) else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        step()
        eager.step()
        for optimizer in (compiled, eager):
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.9
    assert reports and all(r.count("replaced:") == 1 and "left" not in r for r in reports), reports
    close = {"rtol": 2e-6, "atol": 1e-7, "check_device": False}  # torch.compile moves the counts
    for p, q in zip(params, copies, strict=True):
        torch.testing.assert_close(p, q, **close)
        for key, value in eager.state[q].items():
            torch.testing.assert_close(compiled.state[p][key], value, **close)


@pytest.mark.slow
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


@pytest.mark.slow
def test_training_step_of_a_model():
    """Forward, backward and a stock step in one compiled function, against eager."""

    def train(model, optimizer, x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    losses = []
    compiled, reports = reporting(train)
    for run in (train, compiled):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.5)
        batches = [torch.randn(6, 4) for _ in range(4)]
        losses.append([float(run(model, optimizer, x).detach()) for x in batches])
    assert any("replaced:" in report for report in reports), reports
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)


def test_is_a_named_backend():
    assert "tritonopt" in torch._dynamo.list_backends()
    (point,) = entry_points(group="torch_dynamo_backends", name="tritonopt")
    assert point.load() is backend.tritonopt


@pytest.mark.slow
def test_explain():
    params = [torch.nn.Parameter(torch.randn(3)) for _ in range(2)]
    for p in params:
        p.grad = torch.randn(3)
    text = backend.explain(torch.optim.RMSprop(params, momentum=0.9, foreach=True).step)
    assert "replaced: RMSprop of 2 parameters" in text and "momentum=0.9" in text
    text = backend.explain(torch.optim.SGD(params, foreach=True).step)
    assert "left to Inductor: no step of a stock RMSprop or Rprop" in text
    text = backend.explain(complex_parameters, *lists())
    assert "left to Inductor: rmsprop, as it is of torch.complex64" in text
    for p in params:
        p.grad = None
    assert "no graph" in backend.explain(torch.optim.RMSprop(params).step)


@pytest.mark.slow
def test_is_imported_by_who_asks_for_it():
    code = (
        "import sys, tritonopt; assert 'tritonopt.compile.backend' not in sys.modules;"
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


@pytest.mark.slow
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


def test_numbers_that_change_need_two_graphs():
    """Also those that a scheduler does not know."""
    ours, theirs = ([torch.nn.Parameter(torch.ones(3))] for _ in range(2))
    compiled, eager = torch.optim.RMSprop(ours), torch.optim.RMSprop(theirs, foreach=False)
    step, reports = reporting(compiled.step)
    for number in range(1, 6):
        for (p,), optimizer, go in ((ours, compiled, step), (theirs, eager, eager.step)):
            p.grad = torch.full((3,), float(number))
            group = optimizer.param_groups[0]
            group["lr"], group["weight_decay"] = number / 50, 0.1 / number
            go()
    torch.testing.assert_close(ours, theirs)
    assert len(reports) == 2 and all("replaced:" in report for report in reports)
