"""Applies an eager rule to many small tensors that lie apart: once, to copies side by side.

An eager operator costs microseconds whatever it works on. A stock optimizer's tensors have no
neighbours, so that a hundred small ones would pay for a thousand operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tritonopt.eager import Scratch
from tritonopt.sweep import SERIAL, Sweep, _flat

SMALL = 2**12
"""Elements. At 2^14 the copies cost as much as the operators (2 cores)."""


class Gather:
    """The update of small `params` and their state, as `Sweep`'s; all of them have gradients."""

    def __init__(
        self,
        rule: Callable[..., None],
        params: Sequence[Tensor],
        columns: Sequence[Sequence[Tensor] | None],
    ) -> None:
        self.rule = rule
        self.used = [column is not None for column in columns]
        self.originals = [
            [_flat(tensor) for tensor in column]
            for column in (params, *columns)
            if column is not None
        ]
        sizes = [p.numel() for p in params]
        dtype = torch.float64 if params[0].dtype == torch.float64 else torch.float32
        kind: dict[str, Any] = {"dtype": dtype, "device": "cpu"}  # whatever the default device
        memory = torch.zeros(len(self.originals) + 1, sum(sizes), **kind)
        self.copies = list(memory)  # the gradients' comes last
        self.pieces = [copy.split(sizes) for copy in self.copies]
        self._scratch = torch.empty(2, min(sum(sizes), SERIAL), **kind)
        self._blocks = [self._arguments(block) for block in memory.split(SERIAL, dim=1)]

    def _arguments(self, columns: Sequence[Tensor] | Tensor) -> list[Any]:
        param, *states, grad = columns
        rest = iter(states)
        scratch = Scratch.of(*self._scratch[:, : len(param)])
        return [param, grad, *(next(rest) if used else None for used in self.used), scratch]

    def __call__(self, grads: Sequence[Tensor], **hyper: Any) -> None:
        flat = [grad if grad.dim() == 1 else _flat(grad) for grad in grads]
        for originals, copy in zip([*self.originals, flat], self.copies, strict=True):
            torch.cat(originals, out=copy)
        if isinstance(hyper.get("step"), Tensor):  # each has a number of its own
            for *columns, step in zip(*self.pieces, hyper["step"].tolist(), strict=True):
                self.rule(*self._arguments(columns), **{**hyper, "step": step})
        else:
            for block in self._blocks:
                self.rule(*block, **hyper)
        for originals, pieces in zip(self.originals, self.pieces, strict=False):
            torch._foreach_copy_(originals, pieces)


class Counter:
    """Adds 1 to many scalars that lie apart, in a third of the time of `torch._foreach_add_`."""

    def __init__(self, steps: Sequence[Tensor]) -> None:
        self.originals = [step.view(1) for step in steps]
        self.copy = torch.empty(len(steps), dtype=steps[0].dtype, device=steps[0].device)
        self.pieces = self.copy.split(1)

    def __call__(self) -> None:
        torch.cat(self.originals, out=self.copy)
        self.copy += 1
        torch._foreach_copy_(self.originals, self.pieces)


def small(sweep: Sweep, params: Sequence[Tensor]) -> list[int]:
    """Indices of the tensors that are better gathered than updated one after the other."""
    found = [index for index in sweep.alone if params[index].numel() <= SMALL]
    return found if len(found) > 4 else []
