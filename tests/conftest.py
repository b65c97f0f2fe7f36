"""Axes that many tests share."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import OURS

from tritonopt.device import INTERPRET, path

# The interpreter takes the place of a GPU: these folders have no launches of their own.
collect_ignore = ["compile", "integrations", "tools"] if INTERPRET else []

DEVICES = ["cpu"]
if torch.accelerator.is_available() and not INTERPRET:  # it reads the CPU's memory only
    DEVICES.append(torch.accelerator.current_accelerator().type)


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=DEVICES, ids=lambda device: "cpu" if device == "cpu" else "accelerator")
def anywhere(request) -> torch.device:
    """As `device`. What stands in for a GPU in tests with its name has not all instructions."""
    return torch.device(request.param)


@pytest.fixture(params=OURS)
def name(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Plain `pytest` runs a test with each row of each table, not with each combination of rows.

    Of a test that compiles, four rows do: each takes a second or more.
    """
    tests: dict[str, list[tuple[pytest.Item, list[tuple[int, ...]]]]] = {}
    for item in items:
        if hasattr(item, "callspec") and not item.get_closest_marker("slow"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append((item, _rows(item)))
    for name, some in tests.items():
        tables = [
            list(dict.fromkeys(rows)) for rows in zip(*(rows for _, rows in some), strict=True)
        ]
        count = min(max(map(len, tables)), 4 if "/compile/" in name else len(some))
        diagonal = [[table[i % len(table)] for table in tables] for i in range(count)]
        for item, rows in some:
            if rows not in diagonal:
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    gc.freeze()  # what is there now need not be looked at by each collection of a test


@pytest.fixture(scope="session", autouse=True)
def interpreted(request) -> Iterator[Any]:
    """The tests of `test_on_the_interpreter.py`, started at once: they keep another core busy."""
    chosen = [item for item in request.session.items if item.name == "test_some_of_everything"]
    if not chosen or INTERPRET:
        yield None
        return
    tests = Path(__file__).parent
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", tests.parent]
    started = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *(tests / n for n in chosen[0].module.SOME)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    yield started
    started.kill()


def _rows(item: Any) -> list[tuple[int, ...]]:
    """What an item has of each table, a `parametrize` or a fixture, by identity."""
    params = item.callspec.params
    marks = [mark.args[0] for mark in item.iter_markers("parametrize")]
    tables = [[n.strip() for n in m.split(",")] if isinstance(m, str) else [*m] for m in marks]
    tables += [[name] for name in params if not any(name in names for names in tables)]
    return [tuple(id(params[name]) for name in names) for names in tables]


def pytest_report_header() -> str:
    paths = ", ".join(f"{d}: {path(torch.device(d))[1]}" for d in DEVICES)
    return f"torch {torch.__version__}; paths: {paths}"
