"""RMSprop and Rprop for PyTorch: one Triton kernel per step, the same training to the last bit."""

from tritonopt import ops as ops
from tritonopt.rmsprop import RMSprop
from tritonopt.rprop import Rprop

__all__ = ["RMSprop", "Rprop"]
__version__ = "0.1.0"
