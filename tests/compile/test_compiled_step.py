"""`torch.compile(optimizer.step)`: nothing of the step is in a graph, and all of it happens."""

import pytest
import torch
from cases import OURS
from compile_cases import (
    BACKENDS,
    EVENTS,
    KWARGS,
    NAMES,
    VARIANTS,
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
from torch._dynamo.exc import Unsupported

__all__ = ["fresh"]  # an autouse fixture
pytestmark = skip_interpreted


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
def test_between_steps(name, event, device):
    ours, theirs = optimizers(name, parameters(device=device))
    step = torch.compile(ours.step, backend="aot_eager")
    for number in range(6):
        if number in (2, 4):
            event(ours, theirs)
        give_gradients(ours, theirs, missing={number % 3})
        step()
        theirs.step()
        assert_close(ours, theirs)


def momentum(group):
    group["momentum"] = 0.9


def centered(group):
    group["centered"] = True


def double(group):
    for p in group["params"]:
        p.data = p.data.double()


@pytest.mark.parametrize("change", [momentum, centered, double])
def test_before_the_first_step(change, device):
    """Dynamo moves the counts of steps of torch's optimizers to the device; ours stay."""
    ours, theirs = optimizers("RMSprop", parameters(device=device))
    for optimizer in (ours, theirs):
        change(optimizer.param_groups[0])
    step = torch.compile(ours.step, backend="aot_eager")
    for _ in range(3):
        give_gradients(ours, theirs)
        step()
        theirs.step()
        assert_close(ours, theirs)
    states = [entry for optimizer in (ours, theirs) for entry in optimizer.state.values()]
    assert all(entry["step"].is_cpu for entry in states)


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
def test_twenty_optimizers():
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


@pytest.mark.parametrize("what", ["the step", "a function"])
def test_fullgraph_raises_the_reason_and_changes_nothing(name, what):
    ours, theirs = optimizers(name, parameters(((3,),)))
    give_gradients(ours, theirs)

    def function():
        ours.step()
        return params_of(ours)[0] * 2

    function = function if what == "a function" else ours.step
    with pytest.raises(Unsupported, match="call it outside of what fullgraph=True compiles"):
        torch.compile(function, backend="eager", fullgraph=True)()
    assert_close(ours, theirs)
    assert not ours.state
