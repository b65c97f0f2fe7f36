"""A compiled function may call `optimizer.step()`, which runs as it is, between graphs.

What is read before it is old, what is read after it is new, and autograd notices.
"""

from pathlib import Path

import pytest
import torch
from cases import OURS, TORCH
from compile_cases import (
    NAMES,
    SCHEDULERS,
    assert_close,
    fresh,
    give_gradients,
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
INDUCTOR = pytest.param("RMSprop", "inductor", marks=slow)
"""The step is in no graph: to Inductor both optimizers are the same."""
backends = pytest.mark.parametrize(
    ("name", "backend"), [*((name, "aot_eager") for name in NAMES), INDUCTOR]
)


@pytest.fixture
def compiled_frames():
    """File and name of each function that dynamo has compiled."""
    frames = []

    def note(code, _):
        frames.append((Path(code.co_filename), code.co_name))

    handle = register_bytecode_hook(note)
    yield frames
    handle.remove()


def stepped(ours, theirs):
    """Both with state."""
    give_gradients(ours, theirs)
    ours.step()
    theirs.step()
    return ours, theirs


COPIES = {
    "product": lambda t: t * 2,
    "clone": torch.clone,
    "clone of a view": lambda t: t.detach().view(-1).clone(),
    "cat": lambda t: torch.cat([t.view(-1)]),
    "times 1": lambda t: t * 1,
    "bits": lambda t: t.detach().view(torch.int32).clone(),
    "an element": lambda t: t.reshape(-1)[0].exp(),
    "reduced": lambda t: t.mean(),
}


@backends
def test_reads_before_and_after(name, backend):
    ours, theirs = stepped(*optimizers(name, parameters(((3, 5),))))

    def read(optimizer):
        found = []
        copies = {**COPIES}
        if backend == "inductor":  # that of torch 2.14 returns the tensor itself
            del copies["times 1"]
        for after in (False, True):
            for param, state in optimizer.state.items():
                some = next(t for t in state.values() if t.dim())
                found += [make(t) for make in copies.values() for t in (param, some)]
                found += [1 - 0.9 ** state["step"], state["step"] * 2]
            if not after:
                optimizer.step()
        return found

    run_both(read, ours, theirs, backend)


@backends
def test_averages_and_backups_are_of_their_time(name, backend):
    """Written to other tensors, which Inductor does at the end of a graph."""
    ours, theirs = stepped(*optimizers(name, parameters(((4, 3), (4, 3)))))
    for optimizer in (ours, theirs):
        optimizer.kept = [torch.zeros(4, 3) for _ in range(5)] + [torch.zeros(())]

    def average(optimizer):
        mean, twice, rows, of_state, part, scalar = optimizer.kept
        for _ in range(2):
            for param, state in optimizer.state.items():
                mean.lerp_(param, 0.5)
                twice.copy_(param * 2)
                rows.add_(param.mean(0))
                of_state.add_(next(t for t in state.values() if t.dim()), alpha=2)
                part[:2].add_(param[:2].sigmoid())
                scalar.add_(param[0, 0] * 3)
            optimizer.step()
        return [t * 2 for t in optimizer.kept]

    run_both(average, ours, theirs, backend)


@backends
@pytest.mark.parametrize("what", ["update length", "kept copy", "EMA twice"])
def test_foreach_reads_before_the_step(name, what, backend):
    ours, theirs = optimizers(name, parameters(((3, 4), (3, 4))))
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    for optimizer in (ours, theirs):
        optimizer.ema = [torch.zeros(3, 4) for _ in range(2)]

    def read(optimizer):
        params, ema = params_of(optimizer), optimizer.ema
        if what == "update length":
            old = torch._foreach_mul(params, 1.0)
            optimizer.step()
            return torch._foreach_norm(torch._foreach_sub(params, old))
        if what == "kept copy":
            torch._foreach_copy_(ema, params)
            optimizer.step()
            return torch._foreach_sub(params, ema)
        average(ema, params, 1)
        optimizer.step()
        average(ema, params, 1)
        return [t * 2 for t in ema]  # Inductor may return the very tensor for a clone of it

    run_both(read, ours, theirs, backend, calls=3)


@backends
@pytest.mark.parametrize("what", ["dict", "read first", "plain"])
def test_a_backup_holds_the_old_values_whatever_lr_does(name, what, backend):
    """As dynamo's second graph, for another lr, orders its inputs otherwise."""
    ours, theirs = optimizers(name, parameters(((3, 4),)), lr=0.1)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (ours, theirs)]
    models = [torch.nn.ParameterDict({"p": params_of(o)[0]}) for o in (ours, theirs)]
    backups = [{"p": torch.zeros(3, 4)} for _ in models]

    def keep_and_step(optimizer, model, backup):
        norm = model["p"].norm() if what == "read first" else None
        for key, param in model.items() if what == "dict" else (("p", params_of(optimizer)[0]),):
            backup[key].copy_(param)
        optimizer.step()
        return norm

    compiled = torch.compile(keep_and_step, backend=backend)
    with torch.no_grad():
        for _ in range(4):
            give_gradients(ours, theirs)
            norms = [
                f(o, m, b)
                for f, o, m, b in zip(
                    (compiled, keep_and_step), (ours, theirs), models, backups, strict=True
                )
            ]
            torch.testing.assert_close(*norms)
            torch.testing.assert_close(*backups, rtol=0, atol=0)
            for scheduler in schedulers:
                scheduler.step()
    assert_close(ours, theirs)


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


@backends
@pytest.mark.parametrize("shape", [(), (4,)], ids=str)
def test_a_parameter_that_is_read_with_gradients_before_the_step(name, shape, backend):
    """Also a 0-dim one, which a graph of the whole would keep in a register."""
    results = []
    for kind in (OURS[name], lambda params: TORCH[name](params, foreach=False)):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(shape))
        optimizer = kind([param])

        def read_and_step(param=param, optimizer=optimizer):
            before = param.sin() + param  # its backward needs the old value
            before.sum().backward()
            optimizer.step()
            return before.detach() * 2, param * 2

        compiled = torch.compile(read_and_step, backend=backend)
        results.append([compiled() for _ in range(3)] + [param.detach(), param.grad])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


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
