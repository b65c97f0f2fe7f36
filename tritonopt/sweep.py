"""Applies an eager rule to many tensors in pieces that stay in the CPU's cache.

Eager operators over a long tensor run from memory, one pass each. Over pieces of 2^19 elements they
run from cache, 5 times as fast. Small tensors that lie side by side in slabs are one piece: only
their gradients, which autograd scatters, are gathered first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from tritonopt import eager, slab
from tritonopt.span import Span, present, spans

PIECE = 2**19
"""Elements. 2^19 and 2^20 measured alike (2 cores, 32 MiB of L3), 2^17 a third slower."""

GATHERED = 2**16
"""Elements up to which a gradient is gathered. Beyond, its copy costs what operators on it do."""

SERIAL = 2**15 - 1
"""Elements up to which torch runs an operator, `cat` included, on the calling thread."""

MANY, LITTLE = 200, 2**17
"""So many tensors keep the host busy until the other threads have fallen asleep; so few elements
are updated in the 0.13 ms that it takes to wake them."""

RECENT_ROOMS = 64
"""Lengths whose scratch is kept as views. Where gradients are missing, any length may occur."""


class Sweep:
    """The update of `params` and their state, which must not move as long as it is used.

    `columns` has one list of tensors per state of the rule, in its order; None for an unused one.
    """

    def __init__(
        self,
        rule: Callable[..., None],
        params: Sequence[Tensor],
        columns: Sequence[Sequence[Tensor] | None],
    ) -> None:
        self.rule = rule
        self.piece = self._piece(params)
        self.columns = [params, *columns]
        self.dtype = torch.float64 if params[0].dtype == torch.float64 else torch.float32
        limit = min(self.piece, PIECE)
        self.spans, self.alone = spans(self.columns, limit, GATHERED)
        # Of what lies in a slab: views would keep anything else from being packed.
        self._pieces = {i: self._cut(i) for i in self.alone if slab.find(params[i]) is not None}
        longest = max(
            [0]
            + [span.offsets[-1] for span in self.spans]
            + [min(params[index].numel(), limit) for index in self.alone]
        )
        kind: dict[str, Any] = {"dtype": self.dtype, "device": "cpu"}  # whatever the default device
        casts = [c is not None and c[0].dtype != self.dtype for c in self.columns]
        self._casts = [torch.empty(longest, **kind) if c else None for c in casts]
        self._scratch = torch.empty(2, longest, **kind)
        self._rooms: dict[int, eager.Scratch] = {}
        self._grad = torch.zeros(longest, **kind)
        self._grads = [
            [
                self._grad.as_strided(params[index].size(), params[index].stride(), offset)
                for index, offset in enumerate(span.offsets[:-1], span.first)
            ]
            for span in self.spans
        ]

        # Vectors without padding between them are concatenated in less than half the time.
        self._gapless = [
            all(v.dim() == 1 for v in views) and sum(map(Tensor.numel, views)) == span.offsets[-1]
            for span, views in zip(self.spans, self._grads, strict=True)
        ]

    def _cut(self, index: int) -> list[list[Tensor | None]]:
        """The pieces of a tensor and its state, in the order of `columns`."""
        count = -(-self.columns[0][index].numel() // self.piece)  # type: ignore[index]
        cut = [
            [None] * count if c is None else _split(c[index].detach(), self.piece)
            for c in self.columns
        ]
        return list(map(list, zip(*cut, strict=True)))

    def _piece(self, params: Sequence[Tensor]) -> int:
        """Elements of a piece."""
        asleep = len(params) >= MANY and sum(p.numel() for p in params) <= LITTLE
        return min(SERIAL, PIECE) if asleep else PIECE

    def __call__(
        self, grads: Sequence[Tensor | None], factor: Tensor | None = None, **hyper: Any
    ) -> None:
        """Updates every tensor that has a gradient. A gradient has its parameter's strides.

        Gradients count `factor` times.
        `step`, if the rule takes it, is a number, or a tensor with the number of each tensor.
        """
        factor = None if factor is None else factor.cpu()  # of a norm over several devices
        steps = hyper["step"].tolist() if isinstance(hyper.get("step"), Tensor) else None
        for span, views, gapless in zip(self.spans, self._grads, self._gapless, strict=True):
            for part in _stretches(span, grads, steps):
                if steps is not None:
                    hyper["step"] = steps[span.first + part.start]
                source: Any = grads[span.first + part.start : span.first + part.stop]
                where = slice(span.offsets[part.start], span.offsets[part.stop])
                grad, flats = self._grad[where], span.flats
                if len(source) < len(span):
                    flats = [None if flat is None else flat[where] for flat in flats]
                if gapless:
                    torch.cat(source, out=grad)
                else:
                    torch._foreach_copy_(views[part], source)
                if factor is not None:
                    grad.mul_(factor)
                self._update(flats, grad, hyper)
        for index in self.alone:
            whole = grads[index]
            if whole is not None:
                if steps is not None:
                    hyper["step"] = steps[index]
                rows = self._pieces.get(index) or self._cut(index)
                for row, piece in zip(rows, _split(whole, self.piece), strict=True):
                    if factor is not None:
                        room = self._grad[: piece.numel()]
                        same = room.numel() == piece.numel()
                        piece = (room.copy_(piece) if same else piece.to(self.dtype)) * factor
                    self._update(row, piece, hyper)

    def _update(self, flats: Sequence[Tensor | None], grad: Tensor, hyper: dict[str, Any]) -> None:
        """One piece; half precision is computed in fp32 and rounded once."""
        numel = grad.numel()
        if grad.dtype != self.dtype:
            grad = self._grad[:numel].copy_(grad)
        work = [
            flat if flat is None or cast is None else cast[:numel].copy_(flat)
            for flat, cast in zip(flats, self._casts, strict=True)
        ]
        self.rule(work[0], grad, *work[1:], self._room(numel), **hyper)
        for flat, computed in zip(flats, work, strict=True):
            if flat is not None and computed is not None and computed is not flat:
                flat.copy_(computed)

    def _room(self, numel: int) -> eager.Scratch:
        if numel not in self._rooms:
            if len(self._rooms) >= RECENT_ROOMS:
                self._rooms.clear()
            self._rooms[numel] = eager.Scratch.of(*self._scratch[:, :numel])
        return self._rooms[numel]


def _stretches(
    span: Span, grads: Sequence[Tensor | None], steps: list[float] | None
) -> Iterator[slice]:
    """The stretches of a span in which every tensor has a gradient and the same number of steps."""
    if steps is None:
        yield from present(span, grads)
        return
    for part in present(span, grads):
        indices = range(part.start, part.stop)
        for _, same in groupby(indices, lambda index: steps[span.first + index]):
            members = list(same)
            yield slice(members[0], members[-1] + 1)


def _split(tensor: Tensor, piece: int) -> Sequence[Tensor]:
    flat = tensor if tensor.dim() == 1 else _flat(tensor)
    return (flat,) if flat.numel() <= piece else flat.split(piece)


def _flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))
