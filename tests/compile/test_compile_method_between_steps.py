"""After `optimizer.compile()`, whatever happens between two steps happens as in eager."""

import numpy as np
import pytest
import torch
from cases import TORCH
from compile_cases import (
    BACKENDS,
    CHANGES,
    EVENTS,
    NAMES,
    VARIANTS,
    assert_close,
    fresh,
    give_gradients,
    graphs,
    optimizers,
    parameters,
    skip_interpreted,
    smaller,
    step_both,
)  # fmt: skip

__all__ = ["fresh"]  # an autouse fixture
pytestmark = skip_interpreted
backends = pytest.mark.parametrize("backend", BACKENDS)
names = pytest.mark.parametrize("name", NAMES)


@pytest.mark.parametrize("event", EVENTS, ids=lambda f: f.__name__)
@names
def test_between_steps(name, event):
    ours, theirs = optimizers(name, parameters())
    ours.compile(backend="aot_eager")
    for number in range(6):
        if number in (2, 4):
            event(ours, theirs)
        give_gradients(ours, theirs)
        ours.step()
        theirs.step()
    assert_close(ours, theirs, rtol=1e-4)


@backends
@names
def test_gradients_come_and_go(name, backend):
    ours, theirs = optimizers(name, parameters(), lr=0.1)
    ours.compile(backend=backend)
    for missing in [(0, 1, 2, 3), (1,), (), (1,), (0, 3), (), (1,)]:
        give_gradients(ours, theirs, missing)
        for optimizer in (ours, theirs):  # Rprop's first step of each parameter is from this lr
            optimizer.param_groups[0]["lr"] *= 0.9
        ours.step()
        theirs.step()
    assert_close(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "option"), [(n, k) for n in NAMES for k in CHANGES[n]], ids=str)
def test_options_change_between_steps(name, option, backend):
    """Dynamo would turn a float that changes into a symbol, and torch bakes in 1 - symbol."""
    kwargs = {"momentum": 0.9, "weight_decay": 0.1, "centered": True} if name == "RMSprop" else {}
    for _ in range(2):  # the second pair shares what was compiled for the first
        ours, theirs = optimizers(name, parameters(((50,), (40, 50))), **kwargs)
        ours.compile(backend=backend)
        for _ in range(4):
            step_both(ours, theirs)
            assert_close(ours, theirs, rtol=0.0 if name == "Rprop" else 1e-4)
            for optimizer in (ours, theirs):
                group = optimizer.param_groups[0]
                group[option] = smaller(group[option])


KINDS = [
    *[(option, torch.tensor) for option in ("lr", "momentum", "weight_decay", "alpha")],
    *[("lr", kind) for kind in (lambda x: torch.tensor([x]), np.array)],  # torch takes no others
]


@pytest.mark.parametrize(("option", "kind"), KINDS)
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_options_that_are_tensors_may_be_written_to(option, kind, backend):
    """Equal to torch's optimizer, which shares the tensor."""
    start = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "alpha": 0.9}
    ours, theirs = optimizers("RMSprop", parameters(((50,), (40, 50))), TORCH, **start)
    if backend:
        ours.compile(backend=backend)
    shared = kind(start[option])
    for optimizer in (ours, theirs):
        optimizer.param_groups[0][option] = shared
    for value in (0.9, 0.9, 0.4, 0.4, 0.0, 0.5):
        shared[...] = value
        step_both(ours, theirs)
        assert_close(ours, theirs, rtol=1e-4 if backend else 1e-5)  # torch: 1 - alpha in fp32


@backends
@pytest.mark.parametrize(("name", "kwargs"), VARIANTS, ids=str)
def test_every_option(name, kwargs, backend):
    ours, theirs = optimizers(name, parameters(), **kwargs)
    ours.compile(backend=backend)
    for number in range(5):
        give_gradients(ours, theirs, missing={1} if number == 2 else ())
        for optimizer in (ours, theirs):
            optimizer.step(lambda loss=number % 3: float(loss))
        assert_close(ours, theirs, rtol=1e-5)


def test_twenty_optimizers_stay_compiled():
    """All of one rule share one graph: numbers are its inputs."""
    for number in range(20):
        kwargs = {"alpha": 0.9 + number / 1000}
        ours, theirs = optimizers("RMSprop", parameters(((3,), (4,))), **kwargs)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            ours.compile(backend="aot_eager")
            for _ in range(2):
                give_gradients(ours, theirs)
                ours.step()
                theirs.step()
        assert_close(ours, theirs, rtol=1e-5)
        assert graphs() == 1
