"""What launches the rules' kernels, and the norm's."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tritonopt.device import is_capturing
from tritonopt.kernels.grid import Columns, Grid
from tritonopt.kernels.norm import square_sum_kernel
from tritonopt.kernels.rmsprop import rmsprop_kernel
from tritonopt.kernels.rprop import rprop_kernel

BLOCK = 1024
"""8 elements a thread: one 128-bit access per tensor in half precision, two in fp32."""

NORM_BLOCK = 4096
"""Elements of which one program adds up the squares: 32 a thread."""


class Launch(Grid):
    """The update of `params` and their state, which must not move as long as it is used."""

    def __init__(
        self, rule: Callable[..., None], params: Sequence[Tensor], columns: Columns
    ) -> None:
        numels = [param.numel() for param in params]
        super().__init__(numels, [params, *columns], params[0].device, BLOCK)
        self.rule = rule
        self.used = [column is not None for column in columns]

    def __call__(
        self, grads: Sequence[Tensor | None], hyper: dict[str, Any],
        factor: Tensor | None = None, skip: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Updates every tensor that has a gradient. A gradient has its parameter's strides.

        Gradients count `factor` times; nothing is updated where `skip` is not 0.
        """
        given = next((grad for grad in grads if grad is not None), None)
        if given is None or not len(self.programs):
            return
        with torch.accelerator.device_index(self.device.index):
            factor, skip = (
                x if x is None else x.to(self.device, non_blocking=True) for x in (factor, skip)
            )
            self.pointers = self.table(grads), self.programs, factor, skip
            self.grad_dtype = given.dtype
            self.rule(self, **hyper)

    def run(
        self, kernel: Any, numbers: Sequence[float], switches: Sequence[bool | str] = (),
        pointers: Sequence[Tensor | None] = (),
    ) -> None:  # fmt: skip
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
    """Of scattered gradients, in fp32 or fp64. The same gradients give the same bits."""
    grid = _norm_grid(tuple(numels), device)
    sums = torch.empty_like(grid.programs, dtype=torch.promote_types(dtype, torch.float32))
    if len(sums):
        with torch.accelerator.device_index(device.index):
            grid.launch(square_sum_kernel, dtype, (grid.table(grads), grid.programs, sums))
    return sums.sum()


@lru_cache(maxsize=16)  # of which nothing belongs to one optimizer
def _norm_grid(numels: Sequence[int], device: torch.device) -> Grid:
    return Grid(numels, [], device, NORM_BLOCK)
