"""The README's code runs as it stands, and its example trains as torch's does."""

import re
from pathlib import Path

import pytest
import torch

import tritonopt
from tritonopt.device import INTERPRET

README = (Path(__file__).parents[2] / "README.md").read_text()
LINES = 250  # at most: it is to be read once
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_import_is_the_whole_change():
    model = torch.nn.Linear(3, 1)
    namespace = {"model": model, "torch": torch}
    exec(BLOCKS[0], namespace)
    model(torch.ones(3)).sum().backward()
    namespace["optimizer"].step()
    assert isinstance(namespace["optimizer"], torch.optim.RMSprop)


def test_the_example_with_either_import(capsys):
    example = next(block for block in BLOCKS if "tritonopt as optim" in block)
    weights = []
    for text in (example, example.replace("import tritonopt as optim", "from torch import optim")):
        torch.manual_seed(0)
        namespace = {}
        exec(text, namespace)
        weights.append([p.detach().clone() for p in namespace["model"].parameters()])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-7) for a, b in zip(*weights, strict=True))
    first, second = capsys.readouterr().out.split("\n")[:2]
    assert first == second and first.startswith("Loss after one update: ")


@pytest.mark.skipif(INTERPRET, reason="the table names the eager path")
def test_the_description():
    """Of a model of which one parameter has an alias, after a step."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32))
    model.register_parameter("scale", torch.nn.Parameter(torch.ones(426)))
    alias = model.scale.detach()
    optimizer = tritonopt.RMSprop(model.parameters())
    (model(torch.ones(1, 3, 4, 4)).sum() + model.scale.sum()).backward()
    optimizer.step()
    assert optimizer.describe() in README and alias is not None


def test_the_two_commands():
    commands = re.findall(r"^pip install .*$", README, re.M)
    assert commands == [
        'pip install ".[demo]" && python -m tritonopt',
        'pip install -e ".[test]" && pytest',
    ]


def test_it_is_short():
    assert len(README.splitlines()) <= LINES


@pytest.mark.parametrize("number", range(1, len(BLOCKS)))
def test_every_block(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for library in ("lightning", "transformers"):
        if f"import {library}" in BLOCKS[number] or f"from {library}" in BLOCKS[number]:
            pytest.importorskip(library)
    exec(BLOCKS[number], {"__name__": "readme"})
