"""Launches: one kernel over an address table updates every tensor where it lies.

Gradients lie scattered, because autograd hands over fresh tensors. Copying them into a slab would
cost 8 bytes per element; reading them through a table of addresses costs nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonopt.device import is_capturing
from tritonopt.kernels.norm import square_sum_kernel
from tritonopt.kernels.rmsprop import rmsprop_kernel
from tritonopt.kernels.rprop import rprop_kernel
from tritonopt.kernels.tables import Tables

BLOCK, THREADS = 1024, 128
"""8 elements a thread: one 128-bit access per tensor in half precision, two in fp32."""

REGISTERS = 168
"""A thread's at most: three blocks of 128 threads share a multiprocessor's 65536. In fp32 the
kernels take about half of that, in fp64 all of it; none spills."""

NORM_BLOCK = 4096
"""Elements of which one program adds up the squares: 32 a thread."""

_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
INTERPRETED = bool(triton.knobs.runtime.interpret)


class Launch:
    """The update of `params` and their state, which must not move as long as it is used."""

    def __init__(
        self,
        rule: Callable[..., None],
        params: Sequence[Tensor],
        columns: Sequence[Sequence[Tensor] | None],
    ) -> None:
        self.rule = rule
        self.device = params[0].device
        self.numels = [p.numel() for p in params]
        states = [[0] * len(params) if c is None else _addresses(c) for c in columns]
        self.tables = Tables(self.numels, [_addresses(params)], states, self.device, BLOCK)
        self.programs = self.tables.programs
        self.grid = (len(self.programs), 1, 1)
        self.dtypes = (params[0].dtype, next(c[0].dtype for c in columns if c is not None))
        self.unused = tuple(column is None for column in columns)
        self.factor: Tensor | None = None
        self.skip: Tensor | None = None
        self._compiled: dict[Any, tuple[Callable[..., None], list[Any]]] = {}

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
        self.factor, self.skip = _moved(factor, self.device), _moved(skip, self.device)
        grad_dtype = next((g.dtype for g in grads if g is not None), None)
        if grad_dtype is None or self.grid[0] == 0:
            return
        with _on(self.device):
            self.rule(self, self.tables.find(_pointers(grads)), grad_dtype, **hyper)

    def run(
        self,
        kernel: Any,
        pointers: Sequence[Tensor | None],
        numbers: Sequence[float],
        switches: Sequence[bool | str],
        grad_dtype: torch.dtype,
    ) -> None:
        """Launches a kernel with its arguments in order, the types and the block left out.

        Only the first launch of a kind goes through triton's JIT, which looks at every argument
        again: 29 us on a host where the compiled kernel alone takes 10. What it would find changed
        is in `key`.
        """
        key = grad_dtype, *switches, *map(_kind, pointers)
        found = self._compiled.get(key)
        if found is not None:
            run, constants = found
            run(*pointers, *numbers, *switches, *constants)
            return
        types = _types(self, grad_dtype)
        compiled = kernel[self.grid](
            *pointers, *map(_fp64, numbers), *switches, **types, **_options(self.device, THREADS)
        )
        if compiled is not None:  # the interpreter compiles nothing
            self._compiled[key] = compiled[self.grid], [*types.values()]

    def reserve(self) -> None:
        """What a graph capture of later steps will need, and could not allocate itself."""
        self.tables.reserve()


class SquareSum:
    """The sum of the squares of scattered gradients of one device and dtype."""

    def __init__(self, numels: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.tables = Tables(numels, [], [], device, NORM_BLOCK)

    def __call__(self, grads: Sequence[Tensor | None]) -> Tensor:
        """In fp32; in fp64 for fp64. The same gradients give the same bits."""
        programs = self.tables.programs
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        sums = torch.empty(len(programs), dtype=dtype, device=self.device)
        if len(programs):
            with _on(self.device):
                square_sum_kernel[(len(programs),)](
                    self.tables.find(_pointers(grads)), programs, sums,
                    _TYPES[self.dtype], _TYPES[dtype], NORM_BLOCK,
                    **_options(self.device, THREADS),
                )  # fmt: skip
                if not is_capturing(self.device):
                    self.tables.reserve()
        return sums.sum()


@lru_cache(maxsize=16)
def square_sum(numels: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> SquareSum:
    """Found again at each step by what it is made from: nothing in it belongs to one optimizer."""
    return SquareSum(numels, dtype, device)


def rmsprop_(
    launch: Launch,
    table: Tensor,
    grad_dtype: torch.dtype,
    *,
    lr: float | Tensor,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    maximize: bool,
    eps_in_sqrt: bool = False,
    lr_in_momentum: bool = False,
    nesterov: bool = False,
    decoupled_weight_decay: bool = False,
    step: float | Tensor | None = None,
) -> None:
    _, no_grad_avg, no_momentum_buffer = launch.unused
    lr_ptr = lr if isinstance(lr, Tensor) and lr.device == launch.device else None
    if isinstance(lr, Tensor) and lr_ptr is None and is_capturing(launch.device):
        raise RuntimeError(f"a captured graph needs its tensor lr on {launch.device}")
    gain_ptr, gain = None, 1.0  # for bias correction: of each tensor, or of all
    if isinstance(step, Tensor):
        gain_ptr = (1 - alpha ** step.double()).sqrt().to(launch.device)
    elif step is not None:
        gain = (1 - alpha**step) ** 0.5
    launch.run(
        rmsprop_kernel,
        (table, launch.programs, launch.factor, launch.skip, lr_ptr, gain_ptr),
        (0.0 if lr_ptr is not None else float(lr), alpha, eps, weight_decay, momentum, gain),
        (bool(maximize), bool(weight_decay != 0), not no_grad_avg, not no_momentum_buffer,
         eps_in_sqrt, lr_in_momentum, nesterov, decoupled_weight_decay, step is not None),
        grad_dtype,
    )  # fmt: skip


def rprop_(
    launch: Launch,
    table: Tensor,
    grad_dtype: torch.dtype,
    *,
    etaminus: float,
    etaplus: float,
    step_size_min: float,
    step_size_max: float,
    maximize: bool,
    variant: str = "irprop-",
    loss_rose: bool = False,
) -> None:
    launch.run(
        rprop_kernel,
        (table, launch.programs, launch.factor, launch.skip),
        (etaminus, etaplus, step_size_min, step_size_max, float(loss_rose)),
        (bool(maximize), variant),
        grad_dtype,
    )


def _kind(pointer: Tensor | None) -> Any:
    return None if pointer is None else (pointer.dtype, pointer.data_ptr() % 16)


def _types(launch: Launch, grad_dtype: torch.dtype) -> dict[str, Any]:
    param, state = launch.dtypes
    return {
        "PARAM": _TYPES[param],
        "GRAD": _TYPES[grad_dtype],
        "STATE": _TYPES[state],
        "COMPUTE": tl.float64 if param == torch.float64 else tl.float32,
        "BLOCK": BLOCK,
    }


@cache
def _options(device: torch.device, threads: int) -> dict[str, Any]:
    if INTERPRETED:
        return {}
    with _on(device):
        return options(triton.runtime.driver.active.get_current_target(), threads)


def options(target: Any, threads: int) -> dict[str, Any]:
    """How the kernels are compiled. Multiply-adds are fused only where a rule says so."""
    found = {"num_warps": threads // target.warp_size, "enable_fp_fusion": False}
    if target.backend == "cuda":  # else ptxas spills 8 bytes, here and there, for one block more
        found["maxnreg"] = min(REGISTERS, 2**16 // threads)
    return found


def _fp64(value: float) -> Any:
    """A scalar argument; the interpreter would round a Python float to fp32."""
    if not INTERPRETED:
        return value
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    return tl.tensor(TensorHandle(np.array([value], dtype=np.float64), tl.float64), tl.float64)


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def _pointers(grads: Sequence[Tensor | None]) -> tuple[int, ...]:
    try:
        return tuple(map(Tensor.data_ptr, grads))  # type: ignore[arg-type]
    except TypeError:  # of one that is missing
        return tuple([0 if g is None else g.data_ptr() for g in grads])


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)
