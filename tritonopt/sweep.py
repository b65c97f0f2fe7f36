"""Applies an eager rule to many tensors in pieces that stay in the CPU's cache.

Eager operators over a long tensor run from memory, one pass each. Over pieces of 2^19 elements they
run from cache, 5 times as fast. An operator costs microseconds whatever it works on: small tensors
that lie side by side in slabs are one piece, of which only the gradients, which autograd scatters,
are gathered first; small tensors that lie apart are gathered themselves and copied back.
"""

import threading
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from tritonopt.eager import Scratch
from tritonopt.slab import filled
from tritonopt.span import all_given, spans, stretches

PIECE = 2**19
"""Elements. 2^19 and 2^20 measured alike (2 cores, 32 MiB of L3), 2^17 a third slower."""

GATHERED = 2**16
"""Elements up to which a gradient is gathered. Beyond, its copy costs what operators on it do."""

SMALL, FEW = 2**12, 4
"""Elements up to which tensors that lie apart are gathered, if they are more than a few. At 2^14
the copies cost as much as the operators (2 cores). So are parts of a span, between which gradients
are missing, if they have so few elements and tensors on average: with 5 both took as long."""

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
        self.dtype = torch.float64 if params[0].dtype == torch.float64 else torch.float32
        self.columns: list[Any] = [params, *columns]
        self.computes_in_place = all(c[0].dtype is self.dtype for c in self.columns if c)
        self.permuted = not all(param.is_contiguous() for param in params)
        self.join = torch.cat if all(param.dim() == 1 for param in params) else flatten
        if self.permuted:
            self.columns = [c and list(map(_in_memory_order, c)) for c in self.columns]
        self.spans, apart = spans(self.columns, min(self.piece, PIECE), GATHERED)
        small = [index for index in apart if params[index].numel() <= SMALL]
        small = small if len(small) > FEW else []
        self.batches = list(filled(small, lambda index: params[index].numel(), SERIAL))
        self.alone = [(i, self._cut(i)) for i in sorted({*apart} - {*small})]

    def _piece(self, params: Sequence[Tensor]) -> int:
        """Elements of a piece."""
        asleep = len(params) >= MANY and sum(p.numel() for p in params) <= LITTLE
        return min(SERIAL, PIECE) if asleep else PIECE

    def _cut(self, index: int) -> list[tuple[Any, ...]]:
        """The pieces of a tensor and its state, in the order of `columns`."""
        cut = [repeat(None) if c is None else _split(c[index], self.piece) for c in self.columns]
        return list(zip(*cut, strict=False))

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
        if self.permuted:
            grads = [grad if grad is None else _in_memory_order(grad) for grad in grads]
        steps = keys = None
        if isinstance(hyper.get("step"), Tensor):
            steps, hyper = hyper["step"].tolist(), dict(hyper)
        if steps is not None or not all_given(grads):  # what is updated together has one key
            pairs = zip(grads, steps or repeat(True), strict=False)
            keys = [None if grad is None else key for grad, key in pairs]

        def update(some: Sequence[int], flats: Sequence[Any], grad: Tensor) -> None:
            if steps is not None:
                hyper["step"] = steps[some[0]]
            self._update(flats, grad if factor is None else grad.to(self.dtype) * factor, hyper)

        for index, rows in self.alone:
            whole = grads[index]
            if whole is not None:
                for row, piece in zip(rows, _split(whole, self.piece), strict=True):
                    update((index,), row, piece)
        for span in self.spans:
            indices = range(span.first, span.first + len(span))
            parts = stretches(indices, keys)
            count = len(parts)
            if count <= FEW or len(span) > FEW * count or span.offsets[-1] > SMALL * count:
                for some in parts:
                    update(some, span.part(some), self.join([grads[i] for i in some]))  # type: ignore[misc]
            else:
                self._gather(indices, grads, keys, update)
        for batch in self.batches:
            self._gather(batch, grads, keys, update)

    def _gather(
        self,
        indices: Sequence[int],
        grads: Sequence[Any],
        keys: Sequence[Any] | None,
        update: Callable[..., None],
    ) -> None:
        """Updates copies side by side of tensors that lie apart, and copies them back."""
        if keys is not None:
            given = (index for index in indices if keys[index] is not None)
            indices = sorted(given, key=keys.__getitem__)
        for some in stretches(indices, keys):
            columns: Any = [c and [c[index] for index in some] for c in self.columns]
            copies = [column and self.join(column) for column in columns]
            update(some, copies, self.join([grads[index] for index in some]))
            for column, copy in zip(columns, copies, strict=True):
                if column is not None:
                    torch._foreach_copy_(column, unflatten(copy, column))

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


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A view of a dense tensor, of which no order of dimensions need be known."""
    return tensor if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def _split(tensor: Tensor, piece: int) -> Sequence[Tensor]:
    flat = tensor if tensor.dim() == 1 else tensor.view(-1)
    return (flat,) if flat.numel() <= piece else flat.split(piece)
