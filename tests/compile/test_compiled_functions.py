"""A compiled function may call `optimizer.step()`, which runs as it is, between graphs."""

from pathlib import Path

import pytest
import torch
from cases import OURS, TORCH
from compile_cases import (
    BACKENDS,
    EVENTS,
    KWARGS,
    NAMES,
    SCHEDULERS,
    VARIANTS,
    assert_close,
    fresh,
    give_gradients,
    graphs,
    optimizers,
    parameters,
    skip_interpreted,
)  # fmt: skip
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.exc import Unsupported

import tritonopt

__all__ = ["fresh"]  # an autouse fixture
pytestmark = skip_interpreted
slow = pytest.mark.slow
backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def compiled_frames():
    """File and name of each function that dynamo has compiled."""
    frames = []

    def note(code, _):
        frames.append((Path(code.co_filename), code.co_name))

    handle = register_bytecode_hook(note)
    yield frames
    handle.remove()


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]


def run_both(function, ours, theirs, backend="aot_eager", calls=2):
    """What a function returns and leaves, compiled for our optimizer and not for its twin."""
    compiled = torch.compile(function, backend=backend)
    with torch.no_grad():
        for _ in range(calls):
            give_gradients(ours, theirs)
            result, expected = compiled(ours), function(theirs)
            torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
            assert_close(ours, theirs)
            for tensor in torch.utils._pytree.tree_leaves((result, expected)):
                if isinstance(tensor, torch.Tensor):
                    tensor.zero_()  # what was returned is nobody's memory
            assert_close(ours, theirs)


def stepped(ours, theirs):
    """Both with state."""
    give_gradients(ours, theirs)
    ours.step()
    theirs.step()
    return ours, theirs


# The step, compiled alone: nothing of it is in a graph.


@pytest.mark.parametrize("backend", ["eager", *BACKENDS])
@pytest.mark.parametrize(("name", "kwargs"), [(n, k) for n in NAMES for k in KWARGS[n]], ids=str)
def test_a_compiled_step_is_the_eager_step(name, kwargs, backend, device):
    ours, theirs = optimizers(name, parameters(device=device), **kwargs)
    step = torch.compile(ours.step, backend=backend)
    for _ in range(3):
        give_gradients(ours, theirs)
        step()
        theirs.step()
    assert_close(ours, theirs)
    assert graphs() == 0


@pytest.mark.parametrize("event", EVENTS, ids=lambda f: f.__name__)
def test_between_steps(name, event):
    ours, theirs = optimizers(name, parameters())
    step = torch.compile(ours.step, backend="aot_eager")
    for number in range(6):
        if number in (2, 4):
            event(ours, theirs)
        give_gradients(ours, theirs, missing={number % 3})
        step()
        theirs.step()
        assert_close(ours, theirs)


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS[:-1], ids=str)  # which needs a loss
def test_every_option(name, kwargs):
    ours, theirs = optimizers(name, parameters(), **kwargs)

    def norm_and_step(optimizer):
        norm = torch.stack([p.norm() for p in params_of(optimizer)]).sum()
        optimizer.step()
        return norm, [p * 2 for p in params_of(optimizer)]

    run_both(norm_and_step, ours, theirs, calls=3)


def test_irprop_plus_sees_the_loss_of_a_closure():
    ours, theirs = optimizers("Rprop", parameters(((4,),)), lr=0.5, variant="irprop+")

    def step(optimizer):
        (param,) = params_of(optimizer)

        def closure():
            param.grad = 3 * param.detach()
            return (param * param).sum()

        return optimizer.step(closure).detach()

    run_both(step, ours, theirs, calls=5)
    assert ours.param_groups[0]["last_loss"] == theirs.param_groups[0]["last_loss"] is not None


def test_fused_amp_in_a_compiled_function():
    ours, theirs = optimizers("RMSprop", parameters(((4,), (3,))), fused_amp=True)
    for optimizer in (ours, theirs):
        optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer.scaler.scale(torch.ones(()))
    calls = []

    def step(optimizer):
        params = params_of(optimizer)
        params[0].grad.mul_(float("inf") if len(calls) == 2 else 8)
        optimizer.scaler.step(optimizer)
        optimizer.scaler.update()
        return [p + 1 for p in params]

    for _ in range(2):
        run_both(step, ours, theirs)
        calls += [None, None]
    assert ours.scaler.get_scale() < 8
    assert ours.state[params_of(ours)[0]]["step"] < 4


def test_what_only_torch_takes():
    complex_one = torch.nn.Parameter(torch.randn(2, dtype=torch.complex64))
    ours, theirs = optimizers("RMSprop", [*parameters(((3,),)), complex_one])
    step = torch.compile(ours.step, backend="aot_eager")
    for _ in range(2):
        give_gradients(ours, theirs)
        step()
        theirs.step()
    assert_close(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(
    ("option", "name", "values"),
    [("nesterov", "momentum", (0.9, 0.5, 0.0)), ("bias_correction", "alpha", (0.9, 0.8, 1.0))],
)
def test_options_are_checked(option, name, values):
    (param,) = parameters(((4,),))
    optimizer = OURS["RMSprop"]([param], momentum=0.9, **{option: True})
    step = torch.compile(optimizer.step, backend="aot_eager")
    for value in values[:-1]:
        param.grad = torch.randn(4)
        optimizer.param_groups[0][name] = value
        step()
    optimizer.param_groups[0][name] = values[-1]
    with pytest.raises(ValueError, match=f"{option}=True requires"):
        step()


@pytest.mark.slow
def test_twenty_optimizers(compiled_frames):
    """They share the code of `step`, and with it dynamo's limit, beyond which it runs as it is."""
    for number in range(20):
        ours, theirs = optimizers(NAMES[number % 2], parameters(((3,), (4,))))
        step = torch.compile(ours.step, backend="aot_eager")
        for _ in range(2):
            give_gradients(ours, theirs)
            step()
            theirs.step()
        assert_close(ours, theirs)
    assert graphs() == 0


# Around a step: what is read before is old, what is read after is new.

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
        for after in (False, True):
            for param, state in optimizer.state.items():
                some = next(t for t in state.values() if t.dim())
                found += [make(t) for make in COPIES.values() for t in (param, some)]
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
def test_a_backup_holds_the_old_values_whatever_lr_does(what, backend):
    """As dynamo's second graph, for another lr, orders its inputs otherwise."""
    ours, theirs = optimizers("RMSprop", parameters(((3, 4),)), lr=0.1)
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


# Autograd.


def train(model, optimizer, x):
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def little_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))


@backends
@pytest.mark.parametrize(
    "schedule", ["none", "exponential", *(pytest.param(s, marks=slow) for s in [*SCHEDULERS][1:])]
)
def test_training_in_one_compiled_function(name, schedule, backend, compiled_frames):
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


# fullgraph=True.


@pytest.mark.parametrize("what", ["the step", "a function"])
def test_fullgraph_raises_the_reason_and_changes_nothing(name, what):
    ours, theirs = optimizers(name, parameters(((3,),)))
    give_gradients(ours, theirs)

    def function():
        ours.step()
        return params_of(ours)[0] * 2

    function = function if what == "a function" else ours.step
    with pytest.raises(Unsupported, match="Call optimizer.step.. outside of what fullgraph"):
        torch.compile(function, backend="eager", fullgraph=True)()
    assert_close(ours, theirs)
    assert not ours.state
