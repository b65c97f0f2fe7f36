"""After `optimizer.compile()`, nothing is compiled twice, nor are guards asked twice.

Numbers are inputs of one graph for all parameters; each set of switches has a graph of its own.
"""

import pytest
import torch
from compile_cases import (
    BACKENDS,
    CHANGES,
    NAMES,
    SCHEDULERS,
    assert_close,
    fresh,
    give_gradients,
    graphs,
    optimizers,
    pairs,
    parameters,
    skip_interpreted,
    smaller,
    step_both,
)  # fmt: skip

import tritonopt
from tritonopt.compile.fused import Graph

__all__ = ["fresh"]  # an autouse fixture
pytestmark = skip_interpreted
slow = pytest.mark.slow


@pytest.mark.parametrize("count", [2, pytest.param(400, marks=slow)])
def test_one_graph_for_any_number_of_parameters(count):
    ours, theirs = optimizers("Rprop", parameters(((64,),) * count))
    ours.compile()
    for number in range(3):
        give_gradients(ours, theirs, missing=[count - 1] if number == 1 else ())
        ours.step()
        theirs.step()
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] *= 0.5
    assert_close(ours, theirs)
    assert graphs() == 1


@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_schedulers_need_no_further_graph(schedule):
    ours, theirs = optimizers("RMSprop", parameters(((64,), (65,))), lr=0.01, momentum=0.9)
    ours.compile(backend="aot_eager")
    schedulers = [SCHEDULERS[schedule](o) for o in (ours, theirs)]
    for _ in range(50):
        give_gradients(ours, theirs)
        ours.step()
        theirs.step()
        for scheduler in schedulers:
            scheduler.step()
    assert_close(ours, theirs, rtol=1e-3)
    assert graphs() == 1


@pytest.mark.parametrize("eps_in_sqrt", [False, True])
def test_all_options_at_once_are_one_graph(eps_in_sqrt):
    ours, theirs = optimizers(
        "RMSprop", parameters(((64,), (65,))), centered=True, momentum=0.9, weight_decay=0.1,
        bias_correction=True, nesterov=True, maximize=True, eps_in_sqrt=eps_in_sqrt,
        initial_scale=1.0,  # else the first variance is 0, or what rounding makes of it
    )  # fmt: skip
    ours.compile(backend="aot_eager", fullgraph=True)
    for _ in range(3):
        give_gradients(ours, theirs)
        ours.step()
        theirs.step()
    assert_close(ours, theirs, rtol=1e-3)
    assert graphs() == 1


@pytest.fixture
def through_dynamo(monkeypatch):
    """Counts the updates that dynamo's guards were asked about."""
    calls = []
    through_dynamo = Graph._through_dynamo
    monkeypatch.setattr(
        Graph, "_through_dynamo", lambda *args: calls.append(args) or through_dynamo(*args)
    )
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_guards_are_asked_once_per_size_and_numbers(name, through_dynamo):
    """Wherever in a slab the memory lies: the vectors, as two pieces, in the middle of one."""
    shapes = ((300, 300), (64,), (96,), (9, 9, 999), (32,), (96,))
    ours, theirs = optimizers(name, parameters(shapes))
    ours.compile()
    for count, missing in [(4, ()), (4, ()), (5, (1,)), (5, (1,)), (5, ())]:
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] *= 0.5
        step_both(ours, theirs, missing)
        assert len(through_dynamo) == count
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["maximize"] = True
    step_both(ours, theirs)
    assert len(through_dynamo) == 9
    step_both(ours, theirs)
    assert len(through_dynamo) == 9
    assert graphs() == 4  # of few and of many elements
    assert_close(ours, theirs, rtol=0.0 if name == "Rprop" else 1e-3)


@pytest.mark.slow
def test_guards_are_asked_where_torch_is_told_otherwise(through_dynamo):
    ours, theirs = optimizers("RMSprop", parameters(((64,), (96,))))
    ours.compile()
    step_both(ours, theirs)
    with torch.compiler.set_stance("force_eager"):
        step_both(ours, theirs)
    assert len(through_dynamo) == 2
    step_both(ours, theirs)
    assert len(through_dynamo) == 2
    torch._dynamo.reset()
    step_both(ours, theirs)
    assert len(through_dynamo) == 3 and graphs() == 2
    assert_close(ours, theirs, rtol=1e-3)


@pytest.mark.slow
def test_numbers_that_are_none(through_dynamo):
    ours, theirs = optimizers("RMSprop", parameters(((64,), (96,))))
    ours.compile()
    for lr in (1e-2, float("inf"), float("nan"), 1e-3):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = lr
        step_both(ours, theirs)
    assert len(through_dynamo) == 1
    for p, q in pairs(ours, theirs):
        torch.testing.assert_close(p, q, equal_nan=True)


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_size_may_be_a_constant_of_its_code(dynamic, through_dynamo):
    """A backend of one's own is called once per graph, and its code at every step."""
    compiled, ran = [], []

    def backend(module, inputs):
        compiled.append(module)
        return lambda *inputs: ran.append(module) or module(*inputs)

    ours, theirs = optimizers("Rprop", parameters(((64,), (64,))))
    ours.compile(backend=backend, dynamic=dynamic)
    for missing in ((), (0,), (1,), (), (0,), (1,)):
        step_both(ours, theirs, missing)
        assert_close(ours, theirs)
    assert len(ran) == 6 and len(through_dynamo) == 2  # one, or both
    assert len(compiled) == (1 if dynamic else 2)


def test_switches_that_change():
    """Each set has a graph with a code of its own, or dynamo's limit would end compiling."""
    (param,) = parameters([(40,)])
    optimizer = tritonopt.RMSprop([param])
    optimizer.compile(backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for number in range(8):
            group = optimizer.param_groups[0]
            group["decoupled_weight_decay"] = bool(number & 1)
            group["maximize"], group["eps_in_sqrt"] = bool(number & 2), bool(number & 4)
            param.grad = torch.ones_like(param)
            optimizer.step()
    assert graphs() == 8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_change_compile_nothing(name, backend, through_dynamo):
    kwargs = {"momentum": 0.9, "weight_decay": 0.1, "centered": True} if name == "RMSprop" else {}
    ours, theirs = optimizers(name, parameters(((64,), (64,))), **kwargs)
    ours.compile(backend=backend)
    for _ in range(4):
        step_both(ours, theirs)
        for optimizer in (ours, theirs):
            group = optimizer.param_groups[0]
            for option in CHANGES[name]:
                if option != "maximize":
                    group[option] = smaller(group[option])
    assert_close(ours, theirs, rtol=0.0 if name == "Rprop" else 1e-4)
    assert graphs() == len(through_dynamo) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_decay_of_0_and_any_alpha_compile_nothing_either(backend, through_dynamo):
    ours, theirs = optimizers("RMSprop", parameters(((64,), (64,))), centered=True)
    with torch.no_grad():
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["params"][0][3] = torch.inf  # 0 times that would be NaN
    ours.compile(backend=backend)
    for weight_decay, alpha in ((0, 0.99), (0.1, 0.6), (0.0, 0.5), (0.2, 0.4), (0, 0.9)):
        for optimizer in (ours, theirs):
            group = optimizer.param_groups[0]
            group["weight_decay"], group["alpha"] = weight_decay, alpha
            if weight_decay:
                group["params"][0].data[3] = 1.0
        step_both(ours, theirs)
        assert_close(ours, theirs, rtol=1e-4)
    assert graphs() == len(through_dynamo) == 1
