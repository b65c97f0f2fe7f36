"""What torch and triton say of a device."""

import os
from functools import cache

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
"""Triton's interpreter was asked for before import: tensors on the CPU go through the kernels."""


@cache
def path(device: torch.device) -> tuple[str | None, str]:
    """Which path updates tensors of a device ("kernel", "eager", None); its name, or why none."""
    if device.type == "cpu" and not INTERPRET:
        return "eager", "eager"
    from torch._dynamo.device_interface import get_interface_for_device
    from torch.utils._triton import has_triton_package

    if not has_triton_package():
        if INTERPRET:
            raise ImportError("TRITON_INTERPRET asks for triton's interpreter: pip install triton")
        return None, "triton is not installed"
    if INTERPRET:
        why_not = None, "triton's interpreter reads the CPU's memory only"
        return ("kernel", "triton, interpreted") if device.type == "cpu" else why_not
    try:
        if get_interface_for_device(device.type).is_triton_capable(device):
            return "kernel", "triton"
    except (NotImplementedError, RuntimeError):
        device = torch.device(device.type)  # none of this type
    return None, f"triton does not support {device}"


def is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream records a graph."""
    if device.type not in ("cuda", "xpu") or not getattr(torch, device.type).is_initialized():
        return False
    with torch.accelerator.device_index(device.index):
        query = getattr(getattr(torch, device.type), "is_current_stream_capturing", None)
        return bool(query and query())
