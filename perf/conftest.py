"""Options of `pytest perf`."""

from __future__ import annotations

import pytest
import torch

from perf.run import accelerator
from perf.workloads import QUICK, WORKLOADS


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tritonopt")
    group.addoption("--quick", action="store_true", help="few workloads and rounds")
    group.addoption("--device", type=torch.device, default=accelerator() or torch.device("cpu"))
    group.addoption("--compiled-up-to", type=int, metavar="PARAMETERS",
                    help="compile no stock optimizer of more than these")  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "workload" in metafunc.fixturenames:
        chosen = QUICK if metafunc.config.getoption("quick") else tuple(WORKLOADS)
        metafunc.parametrize("workload", chosen)
