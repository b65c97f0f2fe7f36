"""RMSprop and Rprop for PyTorch: one Triton kernel per step, the same training to the last bit."""

from tritonopt import ops as ops
from tritonopt.convert import from_torch
from tritonopt.rmsprop import RMSprop
from tritonopt.rprop import Rprop

__all__ = ["RMSprop", "Rprop", "from_torch"]
__version__ = "0.1.0"
