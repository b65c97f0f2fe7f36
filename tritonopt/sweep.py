"""Applies an eager rule to many tensors in pieces that stay in the CPU's cache.

From cache, the operators of a rule are 5 times as fast. Each costs microseconds whatever it works
on: small tensors that lie side by side in slabs are one piece, of which only the gradients, which
autograd scatters, are gathered; small tensors that lie apart are gathered, too, and copied back.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache, partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from tritonopt.eager import Scratch, apply, computed_in, count
from tritonopt.precision import Noise
from tritonopt.quantized import BLOCK, blocks
from tritonopt.slab import filled, flattened
from tritonopt.span import Columns, Span, all_given, spans, stretches

PIECE = 2**19  # elements; 2^20 measured alike (2 cores, 32 MiB of L3), 2^17 a third slower
GATHERED = 2**16  # a longer gradient is not: its copy would cost what operators on it do
SERIAL = 2**15 - 1  # torch runs operators on no more than that, and `cat`, on the calling thread

SMALL, FEW = 2**12, 4
"""Elements up to which tensors that lie apart are gathered, if they are more than a few. At 2^14
the copies cost as much as the operators (2 cores). So are parts of a span, between which gradients
are missing, if they have so few elements and tensors on average: with 5 both took as long."""

MANY, LITTLE = 200, 2**17
"""So many tensors keep the host busy until the other threads have fallen asleep; so few elements
are updated in the 0.13 ms that it takes to wake them."""

RECENT_ROOMS = 64  # lengths whose scratch is kept: where gradients are missing, any may occur

flatten = torch._C._nn.flatten_dense_tensors
unflatten = torch._C._nn.unflatten_dense_tensors


class Sweep:
    """The update of `params` and their state, which must not move as long as it is used."""

    path = "eager"  # in `describe()`
    mean_alone = 2**62  # elements from which on a tensor is updated alone if its mean is taken
    once = PIECE  # elements of a tensor that is gone through once even if the rule takes its mean

    def __init__(
        self, rule: Callable[..., None], params: Sequence[Tensor], columns: Columns,
        *, is_split: bool = False, is_quantized: bool = False,
    ) -> None:  # fmt: skip
        self.rule, self.is_split, self.is_quantized = rule, is_split, is_quantized
        self.piece = self._piece(params)
        self.dtype = computed_in(params[0])
        self.columns: list[Any] = [params, *columns]
        self.permuted = not all(param.is_contiguous() for param in params)
        if self.permuted:
            self.columns = [column and list(map(flattened, column)) for column in self.columns]
        self.in_place = all(c[0].dtype is self.dtype for c in self.columns if c)
        self.join = torch.cat if all(p.dim() == 1 for p in self.columns[0]) else flatten
        self.scales: Any = len(columns) - is_split if is_quantized else None  # which column
        if is_quantized:  # blocks are of one tensor: neighbours are no span
            self.spans: list[Span] = []
            apart = [index for index, param in enumerate(params) if param.numel()]
        else:
            self.spans, apart = spans(self.columns, min(self.piece, PIECE), GATHERED)
        small = [index for index in apart if params[index].numel() <= SMALL]
        small = small if len(small) > FEW else []
        longest = min(SERIAL, self.piece)  # of several tensors, nothing is cut
        self.batches = filled(small, lambda index: self._room(params[index].numel()), longest)
        self.spans += [self._alone(index) for index in {*apart} - {*small}]
        self.spans.sort(key=lambda span: span.first)

    def _alone(self, index: int) -> Span:
        flats = [column and flattened(column[index]) for column in self.columns]
        return Span(index, [0, flats[0].numel()], flats)

    def _room(self, numel: int) -> int:
        """Elements that a tensor takes beside others."""
        return blocks(numel) * BLOCK if self.is_quantized else numel

    def _piece(self, params: Sequence[Tensor]) -> int:
        asleep = len(params) >= MANY and sum(p.numel() for p in params) <= LITTLE
        return SERIAL // BLOCK * BLOCK if asleep else PIECE  # else random bits, and scales, overlap

    def __call__(
        self, grads: Sequence[Tensor | None], hyper: dict[str, Any],
        factor: Tensor | None = None, skip: Tensor | None = None, noise: Noise | None = None,
    ) -> None:  # fmt: skip
        """Updates every tensor that has a gradient. A gradient has its parameter's strides.

        Gradients count `factor` times; `skip` is for devices; by `noise`, bf16 is rounded. `step`
        of `hyper`, if the rule takes it, is a number, or a tensor with the number of each tensor;
        `mean` is None, or a tensor with what is known of each.
        """
        factor = None if factor is None else factor.cpu()  # of a norm over several devices
        if self.permuted:
            grads = [grad if grad is None else flattened(grad) for grad in grads]
        steps = _values(hyper.get("step"))
        takes_mean, means = "mean" in hyper, _values(hyper.get("mean"))
        keys: list[Any] | None = None  # what is updated together has one key
        if steps or takes_mean or not all_given(grads):
            pairs = zip(grads, steps or repeat(True), strict=False)
            keys = [None if grad is None else key for grad, key in pairs]
        if keys and takes_mean:
            least = 0 if means else self.mean_alone
            for index, param in enumerate(self.columns[0]):
                if keys[index] is not None and param.numel() >= least:
                    keys[index] = -1 - index
        for some, flats in self._memory(keys):
            if steps:
                hyper = {**hyper, "step": steps[some[0]]}
            first = 0
            longest = self.piece if noise is None else min(self.piece, PIECE)
            flats = [self._joined(grads, some), *flats]
            if takes_mean:
                mean: Any = means[some[0]] if means else None
                if len(some) > 1:
                    mean = partial(_means, [self.columns[0][index].numel() for index in some])
                elif mean is None and flats[0].numel() > longest:
                    mean = self._count(flats, hyper, factor) / flats[0].numel()
                hyper = {**hyper, "mean": mean}
            for grad, *piece in self._cut(flats, longest):
                bits: Sequence[Tensor | None] = ()
                if noise is not None:
                    bits = self._bits(noise, some, first, grad.numel(), piece)
                    first += grad.numel()
                if self.is_split:
                    piece[-1] = piece[-1].view(torch.int16)
                if factor is not None:
                    grad = grad.to(self.dtype) * factor
                self._update(piece, grad, hyper, bits)

    def counts(
        self, grads: Sequence[Tensor | None], hyper: dict[str, Any],
        factor: Tensor | None = None, skip: Tensor | None = None, noise: Noise | None = None,
    ) -> Tensor:  # fmt: skip
        """Of each tensor, how many elements the mask has of which the rule takes the mean."""
        factor = None if factor is None else factor.cpu()
        if self.permuted:
            grads = [grad if grad is None else flattened(grad) for grad in grads]
        steps, counts = _values(hyper.get("step")), [0.0] * len(grads)
        keys = [None if grad is None else index for index, grad in enumerate(grads)]
        for (index,), flats in self._memory(keys):
            if steps:
                hyper = {**hyper, "step": steps[index]}
            counts[index] = self._count([self._joined(grads, [index]), *flats], hyper, factor)
        return torch.tensor(counts, dtype=torch.float64, device="cpu")

    def _count(self, flats: Sequence[Any], hyper: dict[str, Any], factor: Tensor | None) -> float:
        total = 0.0
        for grad, *piece in self._cut(flats, PIECE):
            if self.is_split:
                piece[-1] = piece[-1].view(torch.int16)
            grad = grad if factor is None else grad.to(self.dtype) * factor
            scratch = _thread.scratch(grad.numel(), self.dtype)
            total += count(self.rule, grad, piece, scratch, hyper)
        return total

    def _bits(
        self, noise: Noise, some: Sequence[int], first: int, numel: int, piece: Sequence[Any]
    ) -> list[Tensor | None]:
        """Random bits for columns that take any, of a piece of one tensor or of several tensors."""
        alone = len(some) == 1
        numels = [numel] if alone else [self._room(self.columns[0][i].numel()) for i in some]
        pairs = enumerate(piece)
        return [noise.of(some, numels, first, i) if noise.is_for(x) else None for i, x in pairs]

    def _memory(self, keys: Sequence[Any] | None) -> Iterator[tuple[Sequence[int], Sequence[Any]]]:
        """What is updated together, and where: flat parts of slabs, or copies to be copied back."""
        batches: list[Sequence[int]] = [*self.batches]
        for span in self.spans:
            indices = range(span.first, span.first + len(span))
            parts = stretches(indices, keys)
            count = len(parts)
            if count <= FEW or len(span) > FEW * count or span.offsets[-1] > SMALL * count:
                for some in parts:
                    yield some, span.part(some)
            else:
                batches.append(indices)
        for batch in batches:
            if keys is not None:
                batch = sorted(batch, key=lambda index: keys[index] or 0)  # None: no gradient
            for some in stretches(batch, keys):
                copies = [column and self._joined(column, some) for column in self.columns]
                yield some, copies
                for column, copy in zip(self.columns, copies, strict=True):
                    if column is not None and len(some) > 1:  # else it is no copy
                        places = [column[index] for index in some]
                        if self.is_quantized and column is not self.columns[self.scales]:
                            copy = copy[self._places(some)]
                        torch._foreach_copy_(places, unflatten(copy, places))

    def _joined(self, tensors: Any, some: Sequence[int]) -> Tensor:
        """A view of one tensor, or a copy of several side by side, each in whole blocks."""
        if len(some) == 1:
            one = tensors[some[0]]
            return one if one.dim() == 1 else one.view(-1)
        joined = self.join([tensors[index] for index in some])
        if not self.is_quantized or tensors is self.columns[self.scales]:
            return joined
        room = sum(self._room(self.columns[0][index].numel()) for index in some)
        code = 1 if tensors is self.columns[1] else 0  # 0 times an infinite scale would be NaN
        return joined.new_full((room,), code).index_copy_(0, self._places(some), joined)

    def _places(self, some: Sequence[int]) -> Tensor:
        """Of the elements of tensors that are side by side in whole blocks."""
        numels = torch.tensor([self.columns[0][index].numel() for index in some], device="cpu")
        room = (numels + BLOCK - 1) // BLOCK * BLOCK
        shifts = (room - numels).cumsum(0) - (room - numels)
        return torch.arange(int(numels.sum()), device="cpu") + shifts.repeat_interleave(numels)

    def _update(
        self, flats: Sequence[Any], grad: Tensor, hyper: dict[str, Any],
        noise: Sequence[Tensor | None],
    ) -> None:  # fmt: skip
        scratch = _thread.scratch(grad.numel(), self.dtype)
        if self.in_place and grad.dtype is self.dtype:
            self.rule(flats[0], grad, *flats[1:], scratch, **hyper)
        else:
            apply(self.rule, grad, flats, scratch, hyper, noise)

    def _cut(self, flats: Sequence[Any], longest: int) -> Iterable[Sequence[Any]]:
        if flats[0].numel() <= longest:
            return (flats,)
        sizes = [longest] * len(flats)
        if self.is_quantized:
            sizes[-2 if self.is_split else -1] //= BLOCK
        pairs = zip(flats, sizes, strict=True)
        pieces = (repeat(None) if flat is None else flat.split(size) for flat, size in pairs)
        return zip(*pieces, strict=False)


def _values(value: Any) -> list[float] | None:
    return value.tolist() if isinstance(value, Tensor) else None


def _means(numels: Sequence[int], mask: Tensor) -> Tensor:
    """Of tensors that lie side by side, for each element."""
    lengths = torch.tensor(numels, device="cpu")
    means = torch.segment_reduce(mask, "mean", lengths=lengths)
    # Not repeat_interleave: it wakes torch's threads, however few elements there are.
    number = torch.zeros(len(mask), dtype=torch.int32, device="cpu")
    number[lengths.cumsum(0)[:-1]] = 1
    return means.index_select(0, number.cumsum(0, dtype=torch.int32))


class _Thread(threading.local):
    """Memory for intermediate results: of the process, one for each thread and dtype."""

    def __init__(self) -> None:
        empty = torch.inference_mode(False)(torch.empty)
        memory = cache(lambda dtype: empty(2, PIECE, dtype=dtype, device="cpu"))
        self.scratch = lru_cache(RECENT_ROOMS)(lambda n, dtype: Scratch(*memory(dtype)[:, :n]))


_thread = _Thread()
