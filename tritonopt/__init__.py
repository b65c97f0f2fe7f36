"""RMSprop and Rprop for PyTorch: one Triton kernel a step on a GPU, cached pieces on a CPU."""

from importlib import import_module
from types import ModuleType

from tritonopt import ops as ops
from tritonopt.backward import step_in_backward
from tritonopt.convert import from_torch
from tritonopt.rmsprop import RMSprop
from tritonopt.rprop import Rprop

__all__ = ["RMSprop", "Rprop", "from_torch", "step_in_backward"]
__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    modules = {"backend": "tritonopt.compile.backend", "lightning": "tritonopt.lightning"}
    if name in modules:  # imported by who asks for them
        return import_module(modules[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
