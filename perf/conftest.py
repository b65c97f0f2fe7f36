"""Options of `pytest perf`, and what it says at the end."""

from __future__ import annotations

from typing import Any

import pytest

from perf.machine import accelerator, machine, usable_device
from perf.steps import TOLD
from perf.tables import tables
from perf.workloads import CURVE, QUICK, WORKLOADS


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tritonopt")
    group.addoption("--quick", action="store_true", help="few workloads and rounds")
    group.addoption("--device", type=usable_device, default=accelerator() or usable_device("cpu"))
    group.addoption("--compiled-up-to", type=int, metavar="PARAMETERS",
                    help="compile no stock optimizer of more than these")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError('needs pytest-benchmark: pip install -e ".[perf]"')


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "workload" in metafunc.fixturenames:
        chosen = QUICK if metafunc.config.getoption("quick") else (*WORKLOADS, *CURVE)
        metafunc.parametrize("workload", chosen)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if TOLD:
        found, quick = machine(config.getoption("device")), config.getoption("quick")
        results = {"machine": found, "quick": quick, "steps": TOLD}
        terminalreporter.write_line("\n\n".join(tables(results)))
