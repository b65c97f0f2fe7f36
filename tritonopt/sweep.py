"""Applies an eager rule to many tensors in pieces that stay in the CPU's cache.

Eager operators over a long tensor run from memory, one pass each. Over pieces of 2^19 elements they
run from cache, 5 times as fast. An operator costs microseconds whatever it works on: small tensors
that lie side by side in slabs are one piece, of which only the gradients, which autograd scatters,
are gathered first; small tensors that lie apart are gathered themselves and copied back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tritonopt.eager import Scratch
from tritonopt.span import Span, all_given, spans, stretches

PIECE = 2**19
"""Elements. 2^19 and 2^20 measured alike (2 cores, 32 MiB of L3), 2^17 a third slower."""

GATHERED = 2**16
"""Elements up to which a gradient is gathered. Beyond, its copy costs what operators on it do."""

SMALL, FEW = 2**12, 4
"""Elements up to which tensors that lie apart are gathered, if they are more than a few. At 2^14
the copies cost as much as the operators (2 cores)."""

SERIAL = 2**15 - 1
"""Elements up to which torch runs an operator, `cat` included, on the calling thread."""

MANY, LITTLE = 200, 2**17
"""So many tensors keep the host busy until the other threads have fallen asleep; so few elements
are updated in the 0.13 ms that it takes to wake them."""

RECENT_ROOMS = 64
"""Lengths whose scratch is kept as views. Where gradients are missing, any length may occur."""

flatten = torch._C._nn.flatten_dense_tensors
unflatten = torch._C._nn.unflatten_dense_tensors


class Sweep:
    """The update of `params` and their state, which must not move as long as it is used.

    `columns` has one list of tensors per state of the rule, in its order; None for an unused one.
    """

    path = "eager"  # in `describe()`

    def __init__(
        self,
        rule: Callable[..., None],
        params: Sequence[Tensor],
        columns: Sequence[Sequence[Tensor] | None],
    ) -> None:
        self.rule = rule
        self.piece = self._piece(params)
        self.columns: list[Any] = [params, *columns]
        self.dtype = torch.float64 if params[0].dtype == torch.float64 else torch.float32
        self.computes_in_place = all(c[0].dtype is self.dtype for c in self.columns if c)
        self.spans, apart = spans(self.columns, min(self.piece, PIECE), GATHERED)
        self.pads = [self._pads(span) for span in self.spans]
        # Gathered are rows of memory; of other orders of dimensions, a view is made first.
        self.permuted = {i for i, p in enumerate(params) if not p.is_contiguous()}
        small = [i for i in apart if params[i].numel() <= SMALL and i not in self.permuted]
        self.batches = self._batches(small) if len(small) > FEW else []
        gathered = {i for batch in self.batches for i in batch}
        self.alone = [i for i in apart if i not in gathered]
        self._rows: dict[int, list[list[Tensor | None]]] = {}

    def _piece(self, params: Sequence[Tensor]) -> int:
        """Elements of a piece."""
        asleep = len(params) >= MANY and sum(p.numel() for p in params) <= LITTLE
        return min(SERIAL, PIECE) if asleep else PIECE

    def _pads(self, span: Span) -> list[Tensor] | None:
        """What lies between the tensors of a span; None if that is nothing."""
        ends = zip(span.offsets, span.offsets[1:], strict=False)
        params = self.columns[0][span.first : span.first + len(span)]
        gaps = [stop - start - p.numel() for (start, stop), p in zip(ends, params, strict=True)]
        if not any(gaps):
            return None
        zeros = torch.zeros(max(gaps), dtype=self.dtype, device="cpu")
        return [zeros[:gap] for gap in gaps]

    def _batches(self, small: Sequence[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        room = 0
        for index in small:
            numel = self.columns[0][index].numel()
            if numel > room:
                batches.append([])
                room = SERIAL
            batches[-1].append(index)
            room -= numel
        return batches

    def __call__(
        self,
        grads: Sequence[Tensor | None],
        hyper: dict[str, Any],
        factor: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> None:
        """Updates every tensor that has a gradient. A gradient has its parameter's strides.

        Gradients count `factor` times; nothing is updated where `skip` is not 0. `step` of `hyper`,
        if the rule takes it, is a number, or a tensor with the number of each tensor.
        """
        if skip is not None and skip.item():
            return
        factor = None if factor is None else factor.cpu()  # of a norm over several devices
        steps = None
        if isinstance(hyper.get("step"), Tensor):
            steps, hyper = hyper["step"].tolist(), dict(hyper)
        keys = _keys(grads, steps)
        for span, pads in zip(self.spans, self.pads, strict=True):
            for some in stretches(range(span.first, span.first + len(span)), keys):
                if steps is not None:
                    hyper["step"] = steps[some[0]]
                flats, grad = self._side_by_side(span, pads, some, grads)
                self._update(flats, self._scaled(grad, factor), hyper)
        for batch in self.batches:
            order = batch if steps is None else sorted(batch, key=steps.__getitem__)
            given = order if keys is None else [i for i in order if grads[i] is not None]
            for some in stretches(given, keys):
                if steps is not None:
                    hyper["step"] = steps[some[0]]
                grad = flatten([grads[i] for i in some])  # type: ignore[misc]
                self._gather(some, self._scaled(grad, factor), hyper)
        for index in self.alone:
            whole = grads[index]
            if whole is not None:
                if steps is not None:
                    hyper["step"] = steps[index]
                rows = self._rows.get(index) or self._cut(index)
                for row, piece in zip(rows, _split(whole, self.piece), strict=True):
                    self._update(row, self._scaled(piece, factor), hyper)

    def _gather(self, some: Sequence[int], grad: Tensor, hyper: dict[str, Any]) -> None:
        """Updates copies side by side of tensors that lie apart, and copies them back."""
        columns: Any = [c and [c[index] for index in some] for c in self.columns]
        copies: Any = [None if c is None else flatten(c) for c in columns]
        self._update(copies, grad, hyper)
        for column, copy in zip(columns, copies, strict=True):
            if column is not None:
                torch._foreach_copy_(column, unflatten(copy, column))

    def _side_by_side(
        self, span: Span, pads: list[Tensor] | None, some: Sequence[int], grads: Sequence[Any]
    ) -> tuple[list[Tensor | None], Tensor]:
        """Of neighbours in a span: their memory, and their gradients gathered."""
        first, last = some[0] - span.first, some[-1] - span.first
        source = [_flat(grads[i]) if i in self.permuted else grads[i] for i in some]
        if pads is not None:
            between = zip(source, pads[first : last + 1], strict=True)
            source = [tensor for both in between for tensor in both]
        if len(some) == len(span):
            return span.flats, flatten(source)
        where = slice(span.offsets[first], span.offsets[last + 1])
        return [None if flat is None else flat[where] for flat in span.flats], flatten(source)

    def _scaled(self, grad: Tensor, factor: Tensor | None) -> Tensor:
        return grad if factor is None else grad.to(self.dtype) * factor

    def _cut(self, index: int) -> list[list[Tensor | None]]:
        """The pieces of a tensor and its state, in the order of `columns`."""
        count = -(-self.columns[0][index].numel() // self.piece)
        cut = [
            [None] * count if c is None else _split(c[index], self.piece)
            for c in self.columns
        ]
        self._rows[index] = list(map(list, zip(*cut, strict=True)))
        return self._rows[index]

    def _update(self, flats: Sequence[Tensor | None], grad: Tensor, hyper: dict[str, Any]) -> None:
        """One piece; half precision is computed in fp32 and rounded once."""
        dtype = self.dtype
        scratch = _scratch.of(grad.numel(), dtype)
        if self.computes_in_place and grad.dtype is dtype:
            self.rule(flats[0], grad, *flats[1:], scratch, **hyper)
            return
        work = [flat if flat is None else flat.to(dtype) for flat in flats]
        self.rule(work[0], grad.to(dtype), *work[1:], scratch, **hyper)
        for flat, computed in zip(flats, work, strict=True):
            if computed is not flat:
                flat.copy_(computed)  # type: ignore[union-attr,arg-type]


def _keys(
    grads: Sequence[Tensor | None], steps: Sequence[float] | None
) -> Sequence[object] | None:
    """What tensors updated together have in common, None without a gradient; None: all have all."""
    if steps is None:
        return None if all_given(grads) else [None if g is None else True for g in grads]
    return [None if g is None else step for g, step in zip(grads, steps, strict=True)]


class _ThreadScratch(threading.local):
    """Memory for intermediate results: of the process, one for each thread and dtype."""

    def __init__(self) -> None:
        self.memory: dict[torch.dtype, Tensor] = {}
        self.rooms: dict[tuple[int, torch.dtype], Scratch] = {}

    def of(self, numel: int, dtype: torch.dtype) -> Scratch:
        room = self.rooms.get((numel, dtype))
        if room is not None:
            return room
        memory = self.memory.get(dtype)
        if memory is None or memory.size(1) < numel:
            self.rooms.clear()
            size = 1 << (numel - 1).bit_length()
            with torch.inference_mode(False):
                memory = torch.empty(2, size, dtype=dtype, device="cpu")
            self.memory[dtype] = memory
        if len(self.rooms) >= RECENT_ROOMS:
            self.rooms.clear()
        room = self.rooms[numel, dtype] = Scratch.of(*memory[:, :numel])
        return room


_scratch = _ThreadScratch()


def _split(tensor: Tensor, piece: int) -> Sequence[Tensor]:
    flat = tensor if tensor.dim() == 1 else _flat(tensor)
    return (flat,) if flat.numel() <= piece else flat.split(piece)


def _flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they lie in memory."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))
