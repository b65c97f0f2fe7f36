"""`optimizer.compile()` takes what `torch.compile` takes, and raises what it raises."""

import copy
import pickle
import re

import pytest
import torch
from cases import OURS, TORCH
from compile_cases import (
    assert_close,
    fresh,
    give_gradients,
    optimizers,
    parameters,
    skip_interpreted,
)  # fmt: skip
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

import tritonopt

__all__ = ["fresh"]  # an autouse fixture
pytestmark = skip_interpreted


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


@pytest.mark.parametrize("compile", [True, {"backend": "aot_eager"}])
def test_the_constructors_option(compile):
    """It is kept by copies, pickles and checkpoints, and of a dict is what compiles."""
    seen = []
    for make in (lambda p, **k: OURS["Rprop"](p, **k), from_stock):
        params = [torch.nn.Parameter(torch.ones(40)) for _ in range(2)]
        optimizer = make(params, compile=compile)
        copies = [optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
        copies[0].load_state_dict(OURS["Rprop"](params).state_dict())
        for each in copies:
            assert "compiled" in each.describe()
            seen.append(each._sweep.keywords)
    assert all(kwargs == ({} if compile is True else compile) for kwargs in seen)


def from_stock(params, **kwargs):
    return tritonopt.from_torch(TORCH["Rprop"](params), **kwargs)


@inductor_config.patch({"cpp.cxx": ("no-such-compiler",)})
def test_without_a_compiler():
    """A warning says what to install, and steps are taken eagerly; other backends need none."""
    param, twin = (torch.nn.Parameter(torch.ones(40)) for _ in range(2))
    with pytest.warns(UserWarning, match="install a C\\+\\+ compiler"):
        ours = OURS["RMSprop"]([param], compile=True)
    theirs = TORCH["RMSprop"]([twin], foreach=False)
    for p in (param, twin):
        p.grad = torch.full((40,), 0.3)
    for optimizer in (ours, theirs):
        optimizer.step()
    assert torch.equal(param, twin) and "eager" in ours.describe()
    assert "compiled" in OURS["RMSprop"]([param], compile={"backend": "aot_eager"}).describe()


def test_where_torchs_code_was_chosen():
    """A warning says that nothing is compiled; groups without the choice are."""
    params = [torch.nn.Parameter(torch.ones(40)) for _ in range(2)]
    with pytest.warns(UserWarning, match="not compiled: differentiable=True leaves"):
        OURS["RMSprop"](params, differentiable=True, compile=True)
    with pytest.warns(UserWarning, match="not compiled: foreach=True leaves the step to torch"):
        ours = OURS["RMSprop"](params, foreach=True, compile={"backend": "aot_eager"})
    assert "torch" in ours.describe().splitlines()[1]
    ours.param_groups[0]["foreach"] = None
    assert "compiled" in ours.describe().splitlines()[1]
    groups = [{"params": params[:1], "foreach": True}, {"params": params[1:]}]
    assert "compiled" in OURS["RMSprop"](groups, compile={"backend": "aot_eager"}).describe()


@pytest.mark.parametrize("compile", ["yes", 1, []])
def test_neither_true_nor_a_dict(compile):
    with pytest.raises(TypeError, match="compile is to be True, False or a dict"):
        OURS["RMSprop"]([torch.nn.Parameter(torch.ones(4))], compile=compile)


def test_ours_is_compiled_on_demand():
    ours = OURS["Rprop"]([torch.nn.Parameter(torch.ones(4))])
    assert tritonopt.from_torch(ours, compile={"backend": "aot_eager"}) is ours
    assert "compiled" in ours.describe()
