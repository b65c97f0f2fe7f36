"""In a compiled function, what is read before `optimizer.step()` is old, and after it new."""

import pytest
import torch
from cases import OURS, TORCH
from compile_cases import (
    NAMES,
    assert_close,
    fresh,
    give_gradients,
    optimizers,
    parameters,
    params_of,
    run_both,
    skip_interpreted,
)  # fmt: skip

__all__ = ["fresh"]  # an autouse fixture
pytestmark = skip_interpreted
slow = pytest.mark.slow
INDUCTOR = pytest.param("RMSprop", "inductor", marks=slow)
"""The step is in no graph: to Inductor both optimizers are the same."""
backends = pytest.mark.parametrize(
    ("name", "backend"), [*((name, "aot_eager") for name in NAMES), INDUCTOR]
)


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
