"""Launches: one kernel over an address table updates every tensor where it lies.

Gradients lie scattered, because autograd hands over fresh tensors. Copying them into a slab would
cost 8 bytes per element; reading them through a table of addresses costs nothing.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonopt.device import is_capturing
from tritonopt.kernels.norm import square_sum_kernel
from tritonopt.kernels.rmsprop import rmsprop_kernel
from tritonopt.kernels.rprop import rprop_kernel
from tritonopt.kernels.tables import Columns, Tables

BLOCK, THREADS = 1024, 128
"""8 elements a thread: one 128-bit access per tensor in half precision, two in fp32."""

REGISTERS = 168
"""A thread's at most in fp64: three blocks of 128 threads share a multiprocessor's 65536. Left to
itself, ptxas spills 8 bytes for one block more; in fp32 it does not, and takes fewer registers than
under any limit (Rprop at sm_90: 42; 54 where 168 are allowed)."""

NORM_BLOCK = 4096
"""Elements of which one program adds up the squares: 32 a thread."""

INTERPRETED = bool(triton.knobs.runtime.interpret)


class Grid:
    """Launches kernels over scattered tensors: gradients, and `columns` of what is written."""

    def __init__(
        self, numels: Sequence[int], columns: Columns, device: torch.device, block: int
    ) -> None:
        self.numels, self.device, self.block = numels, device, block
        self.dtypes = [column and column[0].dtype for column in columns]
        self.tables = Tables(numels, columns, device, block)
        self.programs = self.tables.programs
        self._compiled: dict[Any, tuple[Callable[..., None], tuple[Any, ...]]] = {}

    def launch(
        self,
        kernel: Any,
        grad_dtype: torch.dtype,
        pointers: Sequence[Tensor | None],
        numbers: Sequence[float] = (),
        switches: Sequence[bool | str] = (),
    ) -> None:
        """Launches a kernel with its arguments in order, TYPES and BLOCK left out.

        Only the first launch of a kind goes through triton's JIT, which looks at every argument
        again: 29 us on a host where the compiled kernel alone takes 10. What it would find changed
        is in `key`.
        """
        kinds = [p if p is None else (p.dtype, p.data_ptr() % 16) for p in pointers]
        key = grad_dtype, *switches, *kinds
        found = self._compiled.get(key)
        if found is not None:
            run, constants = found
            run(*pointers, *numbers, *switches, *constants)
            return
        dtypes = grad_dtype, *self.dtypes
        types = tuple(d and getattr(tl, str(d).removeprefix("torch.")) for d in dtypes)
        grid, constants = (len(self.programs), 1, 1), (types, self.block)
        if INTERPRETED:
            kernel[grid](*pointers, *map(_fp64, numbers), *switches, *constants)
            return
        how = options(triton.runtime.driver.active.get_current_target(), THREADS, types)
        compiled = kernel[grid](*pointers, *numbers, *switches, *constants, **how)
        self._compiled[key] = compiled[grid], constants


class Launch(Grid):
    """The update of `params` and their state, which must not move as long as it is used."""

    def __init__(
        self, rule: Callable[..., None], params: Sequence[Tensor], columns: Columns
    ) -> None:
        numels = [param.numel() for param in params]
        super().__init__(numels, [params, *columns], params[0].device, BLOCK)
        self.rule = rule
        self.used = [column is not None for column in columns]
        self.grad_dtype = params[0].dtype
        self.pointers: tuple[Tensor | None, ...] = ()

    def __call__(
        self,
        grads: Sequence[Tensor | None],
        hyper: dict[str, Any],
        factor: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> None:
        """Updates every tensor that has a gradient. A gradient has its parameter's strides.

        Gradients count `factor` times; nothing is updated where `skip` is not 0.
        """
        given = next((grad for grad in grads if grad is not None), None)
        if given is None or not len(self.programs):
            return
        with torch.accelerator.device_index(self.device.index):
            scaling = [
                t if t is None else t.to(self.device, non_blocking=True) for t in (factor, skip)
            ]
            self.grad_dtype = given.dtype
            self.pointers = self.tables.find(grads), self.programs, *scaling
            self.rule(self, **hyper)

    def run(
        self,
        kernel: Any,
        numbers: Sequence[float],
        switches: Sequence[bool | str] = (),
        pointers: Sequence[Tensor | None] = (),
    ) -> None:
        """Launches the kernel of a rule: `pointers` come behind those that every kernel takes."""
        self.launch(kernel, self.grad_dtype, (*self.pointers, *pointers), numbers, switches)


def rmsprop_(
    launch: Launch, *,
    lr: float | Tensor, alpha: float, eps: float, weight_decay: float, momentum: float,
    maximize: bool, eps_in_sqrt: bool = False, lr_in_momentum: bool = False, nesterov: bool = False,
    decoupled_weight_decay: bool = False, step: float | Tensor | None = None,
) -> None:  # fmt: skip
    _, centered, has_buffer = launch.used
    lr_ptr = gain_ptr = None
    if isinstance(lr, Tensor) and lr.device == launch.device:
        lr_ptr, lr = lr, 0.0
    elif isinstance(lr, Tensor) and is_capturing(launch.device):
        raise RuntimeError(f"a captured graph needs its tensor lr on {launch.device}")
    gain = 1.0  # for bias correction: of each tensor, or of all
    if isinstance(step, Tensor):
        gain_ptr = (1 - alpha ** step.double()).sqrt().to(launch.device)
    elif step is not None:
        gain = (1 - alpha**step) ** 0.5
    launch.run(
        rmsprop_kernel,
        (float(lr), alpha, eps, weight_decay, momentum, gain),
        (bool(maximize), bool(weight_decay != 0), centered, has_buffer, eps_in_sqrt,
         lr_in_momentum, nesterov, decoupled_weight_decay, step is not None),
        (lr_ptr, gain_ptr),
    )  # fmt: skip


def rprop_(
    launch: Launch, *,
    etaminus: float, etaplus: float, step_size_min: float, step_size_max: float, maximize: bool,
    variant: str = "irprop-", loss_rose: bool = False,
) -> None:  # fmt: skip
    numbers = etaminus, etaplus, step_size_min, step_size_max, float(loss_rose)
    launch.run(rprop_kernel, numbers, (bool(maximize), variant))


def square_sum(
    grads: Sequence[Tensor | None], numels: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The sum of the squares of scattered gradients: in fp32, for fp64 in fp64.

    The same gradients give the same bits.
    """
    grid = _norm_grid(tuple(numels), device)
    sums = torch.empty_like(grid.programs, dtype=torch.promote_types(dtype, torch.float32))
    if len(sums):
        with torch.accelerator.device_index(device.index):
            pointers = grid.tables.find(grads), grid.programs, sums
            grid.launch(square_sum_kernel, dtype, pointers)
    return sums.sum()


@lru_cache(maxsize=16)
def _norm_grid(numels: Sequence[int], device: torch.device) -> Grid:
    """Nothing in it belongs to one optimizer."""
    return Grid(numels, [], device, NORM_BLOCK)


def options(target: Any, threads: int, types: Sequence[Any]) -> dict[str, Any]:
    """How the kernels are compiled. Multiply-adds are fused only where a rule says so."""
    found = {"num_warps": threads // target.warp_size, "enable_fp_fusion": False}
    if target.backend == "cuda" and tl.float64 in types:
        found["maxnreg"] = min(REGISTERS, 2**16 // threads)
    return found


def _fp64(value: float) -> Any:
    """A scalar argument for the interpreter, which rounds a Python float to fp32."""
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    return tl.tensor(TensorHandle(np.array([value], dtype=np.float64), tl.float64), tl.float64)
