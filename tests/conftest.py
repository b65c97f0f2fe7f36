"""Axes that many tests share."""

import pytest
import torch
from cases import OURS

from tritonopt.device import INTERPRET, path

DEVICES = ["cpu"]
if torch.accelerator.is_available() and not INTERPRET:  # it reads the CPU's memory only
    DEVICES.append(torch.accelerator.current_accelerator().type)


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=OURS)
def name(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_report_header() -> str:
    paths = ", ".join(f"{d}: {path(torch.device(d))[1]}" for d in DEVICES)
    return f"torch {torch.__version__}; paths: {paths}"
