"""Applies an eager rule to many small tensors that lie apart: once, to copies side by side.

An eager operator costs microseconds whatever it works on. A stock optimizer's tensors have no
neighbours, so that a hundred small ones would pay for a thousand operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tritonopt.sweep import Sweep, _flat

SMALL = 2**12
"""Elements. At 2^14 the copies cost as much as the operators (2 cores)."""


class Gather:
    """The update of small `params` and their state, as `Sweep`'s."""

    def __init__(
        self,
        rule: Callable[..., None],
        params: Sequence[Tensor],
        columns: Sequence[Sequence[Tensor] | None],
    ) -> None:
        used = [params, *(column for column in columns if column is not None)]
        self.originals = [[_flat(tensor) for tensor in column] for column in used]
        sizes = [p.numel() for p in params]
        self.copies = [torch.empty(sum(sizes), dtype=column[0].dtype) for column in used]
        self.pieces = [copy.split(sizes) for copy in self.copies]
        rest = iter(self.copies[1:])
        self.sweep = Sweep(
            rule, self.copies[:1], [None if c is None else [next(rest)] for c in columns]
        )

    def __call__(self, grads: Sequence[Tensor], **hyper: Any) -> None:
        for originals, copy in zip(self.originals, self.copies, strict=True):
            torch.cat(originals, out=copy)
        flat = [grad if grad.dim() == 1 else _flat(grad) for grad in grads]
        self.sweep([torch.cat(flat)], **hyper)
        for originals, pieces in zip(self.originals, self.pieces, strict=True):
            torch._foreach_copy_(originals, pieces)


def small(sweep: Sweep, params: Sequence[Tensor]) -> list[int]:
    """Indices of the tensors that are better gathered than updated one after the other."""
    found = [index for index in sweep.alone if params[index].numel() <= SMALL]
    return found if len(found) > 4 else []
