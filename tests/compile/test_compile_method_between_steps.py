"""After `optimizer.compile()`, whatever happens between two steps happens as in eager."""

import pytest
import torch
from compile_cases import (
    BACKENDS,
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
