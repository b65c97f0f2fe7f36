"""Kernels over scattered tensors, which they find through a table of addresses.

Gradients lie scattered, because autograd hands over fresh tensors. Copying them into a slab would
cost 8 bytes per element; reading them through a table of addresses costs nothing.
"""

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonopt.device import is_capturing

THREADS = 128

REGISTERS = 168
"""A thread's at most in fp64: three blocks of 128 threads share a multiprocessor's 65536. Left to
itself, ptxas spills 8 bytes for one block more; in fp32 it does not, and takes fewer registers than
under any limit (Rprop at sm_90: 42; 54 where 168 are allowed)."""

RECENT_TABLES = 8
"""The caching allocator repeats itself with a short period. 48 bytes per tensor each."""

SPARE_TABLES = 2
"""For graph captures, during which no memory can be pinned."""

INTERPRETED = bool(triton.knobs.runtime.interpret)

Columns = Sequence[Sequence[Tensor] | None]
"""What a kernel writes: the parameters, and each kind of state, or None where it is not used."""

_CAPTURED: list[tuple[Tensor, ...]] = []  # what captured graphs read; never written again


class Grid:
    """The programs of a launch, `block` elements each, and tables for where gradients have been.

    A row of a table is a tensor: numel, the addresses of its gradient and, in every one of
    `columns`, its own. `programs`: index of the tensor << 32 | index of the block.
    """

    def __init__(
        self, numels: Sequence[int], columns: Columns, device: torch.device, block: int
    ) -> None:
        self.numels, self.device, self.block = numels, device, block
        self.dtypes = [column and column[0].dtype for column in columns]
        none = [0] * len(numels)
        found = [none if column is None else [t.data_ptr() for t in column] for column in columns]
        rows = torch.tensor([numels, none, *found], dtype=torch.int64, device="cpu")
        self._rows = rows.t().contiguous()
        blocks = (rows[0] + block - 1) // block
        tensor = torch.repeat_interleave(blocks)
        first = (torch.cumsum(blocks, 0) - blocks)[tensor]
        number = torch.arange(len(tensor), device="cpu") - first
        self.programs = (tensor << 32 | number).to(device)
        self._recent: list[tuple[Any, ...]] = []  # stream, addresses, buffers
        self._spare: list[tuple[Tensor, Tensor]] = []
        self._compiled: dict[Any, tuple[Callable[..., None], tuple[Any, ...]]] = {}

    def table(self, grads: Sequence[Tensor | None]) -> Tensor:
        """The table of these gradients, uploaded if an address has changed; 0: there is none."""
        try:
            at = array("q", map(Tensor.data_ptr, grads))  # type: ignore[arg-type]
        except TypeError:  # of None
            at = array("q", [0 if grad is None else grad.data_ptr() for grad in grads])
        if is_capturing(self.device):
            if not self._spare:
                raise RuntimeError(
                    "a graph capture needs a step outside of it first, and can hold two steps "
                    "after each such step: the tables of addresses are pinned there"
                )
            buffers = self._spare.pop()
            _CAPTURED.append((*buffers, self.programs))
            return self._fill(*buffers, at)
        while len(self._spare) < SPARE_TABLES:
            self._spare.append(self._buffers())
        on_cpu = self.device.type == "cpu"
        stream = None if on_cpu else torch.accelerator.current_stream(self.device)
        for row in self._recent:
            if row[:2] == (stream, at):
                return row[-1]
        if stream is not None:  # they may have been made while another one was current
            self.programs.record_stream(stream)
        buffers = self._buffers()
        table = self._fill(*buffers, at)
        # Another list: another thread may be reading this one, as optimizers share a norm's grid.
        self._recent = [(stream, at, *buffers), *self._recent[: RECENT_TABLES - 1]]
        return table

    def _buffers(self) -> tuple[Tensor, Tensor]:
        """Host memory and its copy on the device, filled once: a copy may be under way."""
        host = torch.empty_like(self._rows, pin_memory=self.device.type != "cpu")
        return host, torch.empty_like(host, device=self.device)

    def _fill(self, host: Tensor, table: Tensor, at: "array[int]") -> Tensor:
        host.copy_(self._rows)
        host[:, 1] = torch.frombuffer(at, dtype=torch.int64)
        return table.copy_(host, non_blocking=True)

    def launch(
        self, kernel: Any, grad_dtype: torch.dtype, pointers: Sequence[Tensor | None],
        numbers: Sequence[float] = (), switches: Sequence[bool | str] = (),
    ) -> None:  # fmt: skip
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


def options(target: Any, threads: int, types: Sequence[Any]) -> dict[str, Any]:
    """How the kernels are compiled. Multiply-adds are fused only where a rule says so."""
    found = {"num_warps": threads // target.warp_size, "enable_fp_fusion": False}
    if target.backend == "cuda" and tl.float64 in types:
        found["maxnreg"] = min(REGISTERS, 2**16 // threads)
    return found


def _fp64(value: float) -> Any:
    """A scalar argument for the interpreter, which rounds a Python float to fp32."""
    from triton.runtime.interpreter import TensorHandle

    data = torch.tensor([value], dtype=torch.float64, device="cpu").numpy()
    return tl.tensor(TensorHandle(data, tl.float64), tl.float64)
