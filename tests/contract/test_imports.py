"""Importing and stepping bring along no more than they need, and no warning."""

import copy
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
from cases import OURS, give_gradients, parameters

SHAPES = [(3, 5), (40,), (), (64,)]


def one_step(optimizer, params):
    give_gradients(params, params)
    optimizer.step()


# Imports.


def run(code, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TRAIN = """
    import torch, tritonopt
    for kind in (tritonopt.RMSprop, tritonopt.Rprop):
        model = torch.nn.Linear(4, 3)
        optimizer = kind(model.parameters(), lr=0.1)
        before = model.weight.detach().clone()
        model(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(before, model.weight)
        print(optimizer.describe())
"""


def test_importing_imports_no_triton():
    run("import sys, tritonopt; assert not [m for m in sys.modules if m.startswith('triton.')]")


@pytest.mark.slow
def test_stepping_on_a_cpu_imports_no_kernel():
    """torch itself imports triton with its first optimizer."""
    check = "assert not [m for m in sys.modules if m.startswith('tritonopt.kernels')]"
    run(textwrap.dedent(TRAIN) + f"import sys; {check}")


BLOCKED = """
    import sys
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "triton":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Blocker())
"""


def test_without_triton():
    assert "eager" in run(textwrap.dedent(BLOCKED) + textwrap.dedent(TRAIN))


@pytest.mark.slow
def test_interpreter_asked_for():
    pytest.importorskip("triton")
    assert "triton, interpreted" in run(TRAIN, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_tests_run_without_expecttest():
    """Torch's own tables of configurations need it."""
    run(
        f"""
        import sys
        sys.modules["expecttest"] = None
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        import cases
        assert cases.CONFIGURATIONS and not cases.INFO
        """
    )


def test_no_warnings(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = parameters(SHAPES)
        ours = OURS[name](params)
        one_step(ours, params)
        ours.load_state_dict(ours.state_dict())
        one_step(ours, params)
        copy.deepcopy(ours)
