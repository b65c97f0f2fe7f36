"""What the tests of perf share. Importing it makes `perf` importable, which is not installed."""

import sys
import types
from pathlib import Path

import pytest
import torch

from tritonopt.device import INTERPRET

ROOT = Path(__file__).parents[1]
perf = sys.modules.setdefault("perf", types.ModuleType("perf"))
perf.__path__ = [str(ROOT / "perf")]  # ROOT in sys.path would hide Hugging Face's `kernels`

CPU = torch.device("cpu")
eager = pytest.mark.skipif(INTERPRET, reason="measures the eager path")
