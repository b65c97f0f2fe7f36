"""opt.compile(): equal to eager, whatever the sizes and whatever happens between steps."""

import copy
import io
import pickle
import re

import numpy as np
import pytest
import torch
from cases import TORCH
from compile_cases import (
    BACKENDS,
    KWARGS,
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
)  # fmt: skip
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import tritonopt
from tritonopt.compile.fused import Graph

__all__ = ["fresh"]  # an autouse fixture
pytestmark = skip_interpreted
slow = pytest.mark.slow
SWEEPS = [
    pytest.param(n, k, d, marks=[] if (n, k) == ("RMSprop", {}) else slow, id=f"{n}-{k}-{d}")
    for n in NAMES
    for k in KWARGS[n]
    for d in ((torch.float32, torch.float64, torch.bfloat16) if k else (torch.float32,))
]


@pytest.mark.parametrize(("name", "kwargs", "dtype"), SWEEPS)
def test_compiled_sweep(name, kwargs, dtype):
    shapes = ((3, 5), (), (0,), (700, 700), (7,))
    params = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters(shapes)]
    if dtype == torch.bfloat16:
        # Without what may cancel.
        kwargs = {k: v for k, v in kwargs.items() if k in ("momentum", "maximize")}
    ours, theirs = optimizers(name, params, **kwargs)
    ours.compile()
    for _ in range(1 if dtype == torch.bfloat16 else 4):  # rounding to half accumulates
        give_gradients(ours, theirs)
        ours.step()
        theirs.step()
    rtol = {torch.float32: 1e-3, torch.float64: 1e-10, torch.bfloat16: 3e-2}[dtype]
    assert_close(ours, theirs, 0.0 if name == "Rprop" else rtol)
    assert graphs() <= 3


@pytest.mark.slow
def test_special_values():
    """A gradient of NaN or infinity is no reason to differ from eager."""
    ours, theirs = optimizers("Rprop", parameters(((64,), (3,))))
    ours.compile()
    for _ in range(3):
        give_gradients(ours, theirs)
        for p, q in pairs(ours, theirs):
            for index, value in enumerate((float("nan"), float("inf"), -0.0)):
                p.grad[index] = q.grad[index] = value
        ours.step()
        theirs.step()
    for p, q in pairs(ours, theirs):
        torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)


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


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_copies_are_compiled_too(duplicate):
    ours, theirs = optimizers("RMSprop", parameters())
    ours.compile(backend="aot_eager")
    for optimizer in (ours, theirs):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    ours = duplicate(ours)
    torch._dynamo.reset()
    counters.clear()
    give_gradients(ours, theirs)
    ours.step()
    theirs.step()
    assert graphs() == 1
    assert_close(ours, theirs, rtol=1e-5)


def test_description():
    optimizer = tritonopt.RMSprop(parameters())
    assert "  eager  " in optimizer.describe()
    optimizer.compile()
    assert "  compiled  " in optimizer.describe()


def test_options_of_torch_compile(monkeypatch):
    seen = []
    compile_function = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **kwargs: seen.append(kwargs) or compile_function(f, **kwargs)
    )
    ours, theirs = optimizers("RMSprop", parameters(), alpha=0.77)
    ours.compile(backend="aot_eager", fullgraph=True)
    give_gradients(ours, theirs)
    ours.step()
    theirs.step()
    assert {"dynamic": True, "backend": "aot_eager", "fullgraph": True} in seen
    assert_close(ours, theirs, rtol=1e-6)


# Past dynamo: the same code, while the same guards would hold.


@pytest.fixture
def through_dynamo(monkeypatch):
    """Counts the updates that dynamo's guards were asked about."""
    calls = []
    through_dynamo = Graph._through_dynamo
    monkeypatch.setattr(
        Graph, "_through_dynamo", lambda *args: calls.append(args) or through_dynamo(*args)
    )
    return calls


def step_both(ours, theirs, missing=()):
    give_gradients(ours, theirs, missing)
    ours.step()
    theirs.step()


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


@pytest.mark.slow
def test_bias_correction_is_a_number_of_the_loop():
    """Inductor would compute its power for every element."""
    ours, theirs = optimizers("RMSprop", parameters(((2**17,),)), bias_correction=True)
    ours.compile()
    for _ in range(3):
        give_gradients(ours, theirs)
        _, code = run_and_get_code(ours.step)
        theirs.step()
        assert not any("pow(" in text for text in code)
    assert_close(ours, theirs, rtol=1e-3)


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


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(100, 2**20), (2**20, 100)], ids=str)
def test_the_size_compiled_first_does_not_decide_about_threads(sizes):
    """Inductor's graph of a dynamic size has the loop that suits the first one."""
    parallel = {}
    for size in sizes:
        ours, theirs = optimizers("Rprop", parameters(((size,),)))
        ours.compile()
        give_gradients(ours, theirs)
        _, (code,) = run_and_get_code(ours.step)
        parallel[size] = "#pragma omp parallel" in code
        theirs.step()
        assert_close(ours, theirs)
    assert parallel == {100: False, 2**20: True}


@pytest.mark.slow
def test_options_reach_inductor():
    for kwargs in ({"options": {"cpp.threads": 1}}, {"mode": "max-autotune-no-cudagraphs"}):
        ours, theirs = optimizers("Rprop", parameters(((2**17,),)))
        ours.compile(**kwargs)
        give_gradients(ours, theirs)
        _, (code,) = run_and_get_code(ours.step)
        theirs.step()
        assert_close(ours, theirs)
        assert bool(re.search("omp parallel", code)) == ("mode" in kwargs)


WRONG = [
    {"options": {"no_such_option": 1}}, {"options": {"max_autotune": "yes"}},
    {"mode": "no such mode"}, {"mode": "no such mode", "disable": True},
    {"mode": "max-autotune", "options": {"max_autotune": True}},
]  # fmt: skip


@pytest.mark.parametrize("kwargs", WRONG, ids=str)
def test_wrong_options_raise_what_torch_raises(kwargs):
    ours, theirs = optimizers("Rprop", parameters(((50,),)))
    before = copy.deepcopy(ours.param_groups[0]["params"])
    give_gradients(ours, theirs)
    with pytest.raises(Exception) as torchs:  # noqa: PT011
        torch.compile(lambda: None, **kwargs)
    with pytest.raises(type(torchs.value), match=re.escape(str(torchs.value)[:40])):
        ours.compile(**kwargs)
    torch.testing.assert_close(ours.param_groups[0]["params"], before, rtol=0, atol=0)
    ours.step()  # as before


CHANGES = {
    "RMSprop": ["lr", "alpha", "eps", "weight_decay", "momentum", "maximize"],
    "Rprop": ["etas", "step_sizes", "maximize"],
}


def smaller(value):
    if isinstance(value, tuple):
        return value[0] * 0.9, value[1] * 0.99
    return not value if isinstance(value, bool) else value * 0.8


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
