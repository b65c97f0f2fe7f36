"""Launches: one kernel over a table of addresses updates every tensor where it lies."""

from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonopt.device import is_capturing
from tritonopt.kernels.arithmetic import INTERPRETED
from tritonopt.kernels.counts import count_sum_kernel
from tritonopt.kernels.norm import square_sum_kernel
from tritonopt.kernels.rmsprop import rmsprop_kernel
from tritonopt.kernels.rprop import rprop_kernel
from tritonopt.kernels.update import AT_RANDOM
from tritonopt.precision import Noise

BLOCK, THREADS = 1024, 128  # 8 elements a thread: 128 bits of a tensor in half precision
NORM_BLOCK = 4096  # elements of which one program adds up the squares: 32 a thread
RECENT_TABLES = 8  # the caching allocator repeats itself with a short period
REGISTERS = 168  # of a thread, at most, in fp64: three blocks of 128 share a multiprocessor's 65536
NAMES = "float16", "bfloat16", "float32", "float64", "int16", "uint8"
TYPES = {getattr(torch, name): getattr(tl, name) for name in NAMES}

Grads = Sequence[Tensor | None]
Columns = Sequence[Sequence[Tensor] | None]  # what a kernel writes; None: no such state


class Grid:
    """What a kernel reads first: programs (index of a tensor << 32 | index of its block), and a
    table with a row for each tensor: numel, the addresses of its gradient and of each column, and
    its origin, if there is one."""

    def __init__(
        self, numels: Sequence[int], columns: Columns, device: torch.device, block: int,
        origins: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.numels, self.device, self.block = numels, device, block
        self.types = [column and TYPES[column[0].dtype] for column in columns]
        none = [0] * len(numels)
        found = [none if column is None else [t.data_ptr() for t in column] for column in columns]
        found += [] if origins is None else [origins]
        rows = torch.tensor([numels, none, *found], dtype=torch.int64, device="cpu")
        self._rows = rows.t().contiguous()
        blocks = (rows[0] + block - 1) // block
        tensor = torch.repeat_interleave(blocks)
        number = torch.arange(len(tensor), device="cpu") - (blocks.cumsum(0) - blocks)[tensor]
        self.programs = tensor << 32 | number
        self._uploaded: dict[Any, Tensor] = {}  # programs, by the stream that copied them
        self._recent: list[tuple[Any, ...]] = []  # stream, addresses, table, programs
        self._compiled: dict[Any, Callable[..., None]] = {}

    def tables(self, grads: Grads) -> tuple[Tensor, Tensor]:
        """The table, uploaded if a gradient's address has changed (0: has none); the programs."""
        try:
            at = list(map(Tensor.data_ptr, grads))  # type: ignore[arg-type]
        except TypeError:  # of None
            at = [0 if grad is None else grad.data_ptr() for grad in grads]
        stream = self.device.type != "cpu" and torch.accelerator.current_stream(self.device)
        capturing = is_capturing(self.device)  # into memory of the graph, which may outlive this
        for row in () if capturing else self._recent:
            if row[:2] == (stream, at):
                return row[2:]
        table = self._upload(self._rows, at)
        if capturing:
            return table, self._upload(self.programs)
        if stream not in self._uploaded:
            self._uploaded[stream] = self._upload(self.programs)
        # A new list: another thread may be reading this one, as optimizers share a norm's grid.
        row = stream, at, table, self._uploaded[stream]
        self._recent = [row, *self._recent[: RECENT_TABLES - 1]]
        return row[2:]

    def _upload(self, host: Tensor, at: list[int] | None = None) -> Tensor:
        """A copy on the device, with the addresses of gradients, if given. It may be under way, or
        captured: torch's allocator keeps what is pinned until then, or as long as the graph."""
        pinned = torch.empty_like(host, pin_memory=self.device.type != "cpu").copy_(host)
        if at is not None:
            pinned[:, 1] = torch.frombuffer(array("q", at), dtype=torch.int64)
        return pinned.to(self.device, non_blocking=True)

    def launch(
        self, kernel: Any, grad_dtype: torch.dtype, pointers: Grads,
        numbers: Sequence[float] = (), switches: Sequence[bool | str] = (),
    ) -> None:  # fmt: skip
        """Launches a kernel with its arguments in order, TYPES and BLOCK left out."""
        # Only the first launch of a kind goes through triton's JIT, 29 us on a host where the
        # compiled kernel alone takes 10. What the JIT would find changed is in `key`.
        kinds = [p if p is None else (p.dtype, p.data_ptr() % 16) for p in pointers]
        key = grad_dtype, *switches, *kinds
        run = self._compiled.get(key)
        types, grid = (TYPES[grad_dtype], *self.types), (len(self.programs), 1, 1)
        if run is not None:
            run(*pointers, *numbers, *switches, types, self.block)
            return
        if INTERPRETED:  # which would round a Python float to fp32
            from triton.runtime.interpreter import TensorHandle

            values = torch.tensor([numbers], dtype=torch.float64, device="cpu").t().numpy()
            numbers = [tl.tensor(TensorHandle(value, tl.float64), tl.float64) for value in values]
            kernel[grid](*pointers, *numbers, *switches, types, self.block)
            return
        how = options(triton.runtime.driver.active.get_current_target(), THREADS, types)
        compiled = kernel[grid](*pointers, *numbers, *switches, types, self.block, **how)
        self._compiled[key] = compiled[grid]


class Launch(Grid):
    """The update of `params` and their state, which must not move as long as it is used."""

    once = 0  # what a rule takes the mean of is gone through twice

    def __init__(
        self, rule: Callable[..., None], params: Sequence[Tensor], columns: Columns,
        origins: Sequence[int] | None = None, *,
        is_split: bool = False, is_quantized: bool = False, is_stochastic: bool = False,
    ) -> None:  # fmt: skip
        numels = [param.numel() for param in params]
        super().__init__(numels, [params, *columns], params[0].device, BLOCK, origins)
        self.rule = rule
        extra = is_split + is_quantized  # columns at the end that a rule does not see
        self.used = [column is not None for column in columns][: len(columns) - extra]
        if is_stochastic:
            self.types = [AT_RANDOM if kind == tl.bfloat16 else kind for kind in self.types]
        if is_split:
            self.types[-1] = tl.int16

    def __call__(
        self, grads: Grads, hyper: dict[str, Any],
        factor: Tensor | None = None, skip: Tensor | None = None, noise: Noise | None = None,
    ) -> None:  # fmt: skip
        """Updates what has a gradient, which has its parameter's strides and counts `factor` times;
        nothing is updated where `skip` is not 0. `noise`: random bits, if the rule takes any."""
        with torch.accelerator.device_index(self.device.index):
            if self._point(grads, factor, skip, noise):
                if "mean" in hyper and hyper["mean"] is None:
                    hyper = {**hyper, "mean": self._counts(hyper) / self.pointers[0][:, 0]}
                self.rule(self, **hyper)

    def counts(
        self, grads: Grads, hyper: dict[str, Any],
        factor: Tensor | None = None, skip: Tensor | None = None, noise: Noise | None = None,
    ) -> Tensor:  # fmt: skip
        """Of each tensor, how many elements the mask has of which the rule takes the mean."""
        with torch.accelerator.device_index(self.device.index):
            if self._point(grads, factor, skip, noise):
                return self._counts(hyper)
            return torch.zeros(len(grads), dtype=torch.float64, device=self.device)

    def _counts(self, hyper: dict[str, Any]) -> Tensor:
        programs: Any = self.pointers[1]
        counts = torch.empty(len(programs), dtype=torch.float32, device=self.device)
        self.rule(self, **{**hyper, "counts": counts})
        sums = torch.zeros(len(self.numels), dtype=torch.float64, device=self.device)
        pointers = *self.pointers[:2], counts, sums
        self.launch(count_sum_kernel, self.grad_dtype, pointers, (), (self._rows.shape[1],))
        return sums

    def _point(
        self, grads: Grads, factor: Tensor | None, skip: Tensor | None, noise: Noise | None
    ) -> bool:
        """Prepares the first arguments of every kernel; False: there is nothing to be updated."""
        given = next((grad for grad in grads if grad is not None), None)
        if given is None or not len(self.programs):
            return False
        both = [x if x is None else x.to(self.device, non_blocking=True) for x in (factor, skip)]
        keys = None if noise is None else self._keys(noise)
        self.pointers, self.grad_dtype = (*self.tables(grads), *both, keys), given.dtype
        return True

    def _keys(self, noise: Noise) -> Tensor:
        """Of each tensor's random bits."""
        steps: Any = noise.steps
        if not isinstance(steps, Tensor):
            key = int(steps) * 2**32 + noise.seed
            return torch.full((len(self.numels),), key, dtype=torch.int64, device=self.device)
        keys = steps.long() * 2**32 + noise.seed
        return self._upload(keys) if keys.is_cpu else keys

    def run(
        self, kernel: Any, numbers: Sequence[float], switches: Sequence[bool | str] = (),
        pointers: Grads = (),
    ) -> None:  # fmt: skip
        """Launches the kernel of a rule: `pointers` come behind those that every kernel takes."""
        self.launch(kernel, self.grad_dtype, (*self.pointers, *pointers), numbers, switches)


def rmsprop_(
    launch: Launch, *,
    lr: float | Tensor, alpha: float, eps: float, weight_decay: float, momentum: float,
    maximize: bool, eps_in_sqrt: bool = False, lr_in_momentum: bool = False, nesterov: bool = False,
    decoupled_weight_decay: bool = False, nan_safe: bool = False,
    step: float | Tensor | None = None, cautious: bool = False,
    mean: Tensor | None = None, counts: Tensor | None = None,
) -> None:  # fmt: skip
    """`mean`, if it is cautious: of the mask over each tensor. With `counts`, its sum over each
    block is stored there, and nothing is updated."""
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
         lr_in_momentum, nesterov, decoupled_weight_decay, nan_safe, step is not None,
         cautious and has_buffer),
        (lr_ptr, gain_ptr, mean if counts is None else None, counts),
    )  # fmt: skip


def rprop_(
    launch: Launch, *,
    etaminus: float, etaplus: float, step_size_min: float, step_size_max: float, maximize: bool,
    variant: str = "irprop-", loss_rose: bool = False,
) -> None:  # fmt: skip
    numbers = etaminus, etaplus, step_size_min, step_size_max, float(loss_rose)
    is_compact = len(launch.used) == 1  # both states in one
    launch.run(rprop_kernel, numbers, (is_compact, bool(maximize), variant))


_norm_grid = lru_cache(maxsize=16)(Grid)  # of which nothing belongs to one optimizer


def square_sum(
    grads: Grads, numels: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Of scattered gradients, in fp32 or fp64. The same ones give the same bits."""
    grid = _norm_grid(tuple(numels), (), device, NORM_BLOCK)
    exact = torch.promote_types(dtype, torch.float32)
    sums = torch.empty(len(grid.programs), dtype=exact, device=device)
    if len(sums):
        with torch.accelerator.device_index(device.index):
            grid.launch(square_sum_kernel, dtype, (*grid.tables(grads), sums))
    return sums.sum()


def options(target: Any, threads: int, types: Sequence[Any]) -> dict[str, Any]:
    """How the kernels are compiled. Multiply-adds are fused only where a rule says so."""
    is_limited = target.backend == "cuda" and tl.float64 in types
    limit = {"maxnreg": min(REGISTERS, 2**16 // threads)} if is_limited else {}
    return {"num_warps": threads // target.warp_size, "enable_fp_fusion": False, **limit}
