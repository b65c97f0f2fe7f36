"""The machine that is measured: what it is, and what it has beside a CPU."""

from __future__ import annotations

import platform
import re
import subprocess
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ASKED = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": _cpu_name(), "threads": torch.get_num_threads(), "os": platform.system(),
        "python": platform.python_version(), "torch": torch.__version__, "triton": None,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }  # fmt: skip
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "memory_bytes": properties.total_memory}
        found |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
        found |= _nvidia_smi(f"GPU-{getattr(properties, 'uuid', '')}")
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _nvidia_smi(identity: str) -> dict[str, str]:
    command = ["nvidia-smi", "-i", identity, f"--query-gpu={','.join(ASKED)}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = done.stdout.strip().split(", ")
    return dict(zip(ASKED, values, strict=True)) if len(values) == len(ASKED) else {}


def accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
