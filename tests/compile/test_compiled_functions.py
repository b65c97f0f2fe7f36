"""A compiled function may train: its step runs as it is, between graphs, and autograd notices."""

from pathlib import Path

import pytest
import torch
from cases import OURS, TORCH
from compile_cases import (
    NAMES,
    SCHEDULERS,
    fresh,
    graphs,
    optimizers,
    parameters,
    params_of,
    run_both,
    skip_interpreted,
)  # fmt: skip
from torch._dynamo.convert_frame import register_bytecode_hook

import tritonopt

__all__ = ["fresh"]  # an autouse fixture
pytestmark = skip_interpreted
slow = pytest.mark.slow


@pytest.fixture
def compiled_frames():
    """File and name of each function that dynamo has compiled."""
    frames = []

    def note(code, _):
        frames.append((Path(code.co_filename), code.co_name))

    handle = register_bytecode_hook(note)
    yield frames
    handle.remove()


def train(model, optimizer, x):
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def little_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))


@pytest.mark.parametrize(
    ("name", "backend", "schedule"),
    [
        *((name, "aot_eager", schedule) for name in NAMES for schedule in ("none", *SCHEDULERS)),
        pytest.param("RMSprop", "inductor", "exponential", marks=slow),
    ],
)
def test_training_in_one_compiled_function(name, backend, schedule, compiled_frames):
    """A scheduler compiles nothing anew, and no function of ours but the frame of `step`."""
    losses = []
    for function in (torch.compile(train, backend=backend), train):
        model = little_model()
        optimizer = OURS[name](model.parameters(), lr=0.01)
        scheduler = SCHEDULERS[schedule](optimizer) if schedule != "none" else None
        losses.append([])
        for number in range(8):
            losses[-1].append(float(function(model, optimizer, torch.randn(6, 4))))
            if scheduler is not None:
                scheduler.step()
            if number == 2:
                count, frames = graphs(), len(compiled_frames)
        assert (graphs(), len(compiled_frames)) == (count, frames)
        torch.manual_seed(0)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
    package = Path(tritonopt.__file__).parent
    assert {name for file, name in compiled_frames if package in file.parents} <= {"step"}


def test_two_optimizers_of_one_function():
    results = []
    for compiled in (False, True):
        models = [little_model() for _ in range(2)]
        made = [OURS[n](m.parameters()) for n, m in zip(NAMES, models, strict=True)]

        def alternate(x, models=models, made=made):
            loss = sum(model(x).square().mean() for model in models)
            loss.backward()
            for optimizer in made:
                optimizer.step()
                optimizer.zero_grad()
            return loss.detach()

        run = torch.compile(alternate, backend="aot_eager") if compiled else alternate
        results.append([float(run(x)) for x in torch.randn(4, 6, 4)])
        torch.manual_seed(0)
    torch.testing.assert_close(*results)


def test_closures(name):
    ours, theirs = optimizers(name, parameters(((4,),)))

    def closure_and_step(optimizer):
        (param,) = params_of(optimizer)

        def closure():
            optimizer.zero_grad()
            loss = (param * param).sum()
            loss.backward()
            return loss

        return optimizer.step(closure).detach() * 2

    run_both(closure_and_step, ours, theirs, calls=3)


def loss_then_step(model, optimizer, x):
    loss = model(x).square().mean()
    optimizer.step()
    return loss


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_backward_after_the_step_raises_as_in_torch(name, backend):
    """A step that is one batch late changes the weights that backward needs."""
    for kinds in (OURS, TORCH):
        model = little_model()
        optimizer = kinds[name](model.parameters())
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        loss = torch.compile(loss_then_step, backend=backend)(model, optimizer, torch.ones(3, 4))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_what_needs_no_old_value_may_be_differentiated_after_the_step(name, backend):
    results = []
    for kind in (OURS[name], lambda params: TORCH[name](params, foreach=False)):
        param = torch.nn.Parameter(torch.tensor(0.5))
        param.grad = torch.tensor(0.25)
        optimizer = kind([param])

        def double_and_step(param=param, optimizer=optimizer):
            twice = param * 2
            optimizer.step()
            return twice

        torch.compile(double_and_step, backend=backend)().backward()
        results.append((param.detach(), param.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)
