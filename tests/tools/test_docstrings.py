"""The examples of docstrings run as they stand, in an interpreter that has imported no more."""

import doctest
import importlib.util
import subprocess
import sys

import pytest

MODULES = {
    "tritonopt": [
        f"tritonopt.{name}" for name in ("rmsprop", "rprop", "convert", "backward", "ops")
    ],
    "lightning": ["tritonopt.lightning"],
}
MODEL = "model = torch.nn.Linear(10, 1)\noptimizer = tritonopt.RMSprop(model.parameters())\n"


def _examples(module):
    """Of each docstring: one may build on what an earlier one has made."""
    with open(importlib.util.find_spec(module).origin) as file:
        texts = file.read().split('"""')[1::2]
    parsed = [doctest.DocTestParser().get_examples(text) for text in texts]
    return ["".join(example.source for example in some) for some in parsed if some]


@pytest.mark.slow
@pytest.mark.parametrize("library", MODULES)
def test_examples(library):
    pytest.importorskip(library)
    sources = [source for module in MODULES[library] for source in _examples(module)]
    assert sources
    script = f"import torch, tritonopt, {library}\n" + "".join(MODEL + s for s in sources)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
