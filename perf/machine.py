"""The machine that is measured: what it is, and which of its devices can be."""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from perf.timing import bandwidth, release

CLOCKS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
          "power.limit", "temperature.gpu")  # fmt: skip


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": _cpu_name(), "threads": torch.get_num_threads(), "os": platform.system(),
        "python": platform.python_version(), "torch": torch.__version__,
        "triton": _version("triton"), "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "memory_bytes": properties.total_memory}
        found |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
        found |= _clocks(device, f"GPU-{getattr(properties, 'uuid', '')}")
    return found


def _clocks(device: torch.device, identity: str) -> dict[str, str]:
    """Asked for while the device is busy: idle, it lowers them."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(_nvidia_smi, identity)
        while not asked.done():
            bandwidth(device)
    release(device)  # another process measures
    return asked.result()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _nvidia_smi(identity: str) -> dict[str, str]:
    command = ["nvidia-smi", "-i", identity, f"--query-gpu={','.join(CLOCKS)}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = done.stdout.strip().split(", ")
    return dict(zip(CLOCKS, values, strict=True)) if len(values) == len(CLOCKS) else {}


def accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def usable_device(name: str) -> torch.device:
    """Of an argument."""
    available = {"cpu", getattr(accelerator(), "type", "cpu")}
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{name!r} is no device") from error
    if device.type not in available:
        raise argparse.ArgumentTypeError(f"{name!r} is not {' or '.join(sorted(available))}")
    return device
