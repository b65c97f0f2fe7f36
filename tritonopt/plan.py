"""Which launches and sweeps update a list of parameters: found once, verified at every step."""

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from itertools import chain, compress, pairwise
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonopt import shard
from tritonopt.device import path
from tritonopt.eager import Scratch, apply, number
from tritonopt.eligible import belongs, same_layout
from tritonopt.precision import REMAINDER, Noise
from tritonopt.quantized import CODE, SCALE, TORCHS
from tritonopt.slab import is_dense
from tritonopt.span import all_given, spans, stretches
from tritonopt.sweep import Sweep
from tritonopt.verify import Geometry, addresses, guard


class Rule(NamedTuple):
    """What tells one optimizer from the other."""

    title: str  # the optimizer's name in error texts
    eager: Callable[..., None]  # the rule in plain torch
    launcher: Callable[[], Callable[..., None]]  # imports triton and returns what launches kernels
    state: tuple[str, ...]  # keys of all state that the rule takes, in its order
    used: tuple[str, ...]  # of it, what the group's options ask for
    takes_step: bool = False  # whether it takes the number of steps, too
    seed: int | None = None  # of random bits; None: it takes none
    is_stochastic: bool = False  # whether bf16 is rounded by random bits; else to nearest
    takes_mean: bool = False  # whether it takes the mean of its mask over each whole tensor, too

    @property
    def is_split(self) -> bool:
        """Whether the last state are lower halves of the parameter, as int16."""
        return REMAINDER in self.used

    @property
    def is_quantized(self) -> bool:
        """Whether the squares' average are codes, with scales as the last state but remainders."""
        return SCALE in self.used

    def with_codes(self) -> "Rule":
        """That of quantized averages of squares."""
        state, used = (
            (*(CODE if key == TORCHS else key for key in keys), SCALE)
            for keys in (self.state, self.used)
        )
        return self._replace(state=state, used=used)

    def with_remainder(self) -> "Rule":
        """That of a parameter in two halves."""
        return self._replace(state=(*self.state, REMAINDER), used=(*self.used, REMAINDER))


class Part(NamedTuple):
    """What one launch or one sweep updates."""

    indices: list[int]
    update: Any
    device: torch.device
    grad_dtype: torch.dtype
    bytes_per_element: int  # that a step moves at the least
    again: int  # bytes per element that it reads twice, of a tensor with more elements than `once`
    once: int

    def bytes_of(self, numel: int) -> int:
        """That a step moves, of a tensor."""
        return numel * (self.bytes_per_element + (self.again if numel > self.once else 0))


Grads = Sequence[Tensor | None]
Lists = Sequence[Sequence[Tensor]]
"""What a step writes: parameters, each state in the rule's order or an empty list, step counts."""


class Plan:
    """The updates of some lists, for as long as what they hold lies where it lay, and as it lay.

    `apart`: indices of parameters to be updated one by one, in order, by the eager rule, as all
    those are whose state has another memory layout. `origins`: where random bits of each begin.
    `shards`: DTensors of which these are this rank's parts, if a rule takes means over all ranks.
    """

    steps_at: list[int] | None = None

    def __init__(
        self, rule: Rule, lists: Lists, grads: Grads,
        sweep: Callable[..., Sweep] = Sweep, apart: Iterable[int] = (),
        origins: Sequence[int] | None = None, shards: Sequence[Any] | None = None,
    ) -> None:  # fmt: skip
        self.rule, self.sweep, self.origins, self.shards = rule, sweep, origins, shards
        params, *columns, _ = lists
        self.geometry = Geometry(lists[:-1])  # of scalars, where they lie is enough
        self.expects: Callable[..., bool] | None = None  # gradients that need no look, one by one
        pairs = zip(params, grads, strict=True)
        self.grad_dtypes = [(p if grad is None else grad).dtype for p, grad in pairs]
        self.apart = sorted(apart)
        self.members: dict[Any, list[int]] = {}  # of each launch or sweep
        for i, param in enumerate(params):
            keyed = zip(rule.state, columns, strict=True)
            states = [column[i] for key, column in keyed if column and key != SCALE]
            if not is_dense(param) or not all(same_layout(state, param) for state in states):
                self.apart = sorted({*self.apart, i})
            elif i not in self.apart:
                dtypes = self.grad_dtypes[i], *(state.dtype for state in states)
                self.members.setdefault((param.device, param.dtype, *dtypes), []).append(i)
        self._place(lists)

    @torch.inference_mode(False)
    def _place(self, lists: Lists) -> None:
        """Makes the launches and sweeps, which know where tensors lie."""
        # Other tensors of the same memory: these may be moved.
        self.params, *columns, steps = ([t.detach() for t in column] for column in lists)
        self.columns = [column or None for column in columns]
        self.parts = [self._part(some) for some in self.members.values()]
        self.addresses = [addresses(column) for column in lists]
        if self.steps_at != self.addresses[-1]:
            self.steps_at = self.addresses[-1]
            self.joined, self.lone = spans([steps], 2**62, 1)
            kinds = {(step.device, step.dtype) for step in steps}
            # Else they are counted one by one: a count of several parameters is counted often.
            self.alike = len(kinds) == 1 and len({*self.addresses[-1]}) == len(steps)

    def moved(self, lists: Lists) -> "Plan | None":
        """The plan of tensors that are what they were and lie elsewhere; None if they are not."""
        if self.apart or not self.geometry.fits(lists[:-1]):
            return None
        places = sorted((t.data_ptr(), t.nbytes) for t in chain(*lists))
        if any(start + size > after for (start, size), (after, _) in pairwise(places)):
            return None  # they overlap
        plan = copy(self)
        plan._place(lists)
        return plan

    def _part(self, some: list[int]) -> Part:
        params = [self.params[index] for index in some]
        columns = [c and [c[index] for index in some] for c in self.columns]
        device, grad_dtype = params[0].device, self.grad_dtypes[some[0]]
        update: Any
        how = {"is_split": self.rule.is_split, "is_quantized": self.rule.is_quantized}
        if path(device)[0] == "eager":
            update = self.sweep(self.rule.eager, params, columns, **how)
        else:
            from tritonopt.kernels.launch import Launch

            origins = self.origins and [self.origins[index] for index in some]
            how["is_stochastic"] = self.rule.is_stochastic
            update = Launch(self.rule.launcher(), params, columns, origins, **how)
        pairs = zip(("param", *self.rule.state), (params, *columns), strict=True)
        sizes = [column[0].itemsize for key, column in pairs if column and key != SCALE]
        bytes_per_element = 2 * sum(sizes) + grad_dtype.itemsize
        again = sum(sizes[1:]) + grad_dtype.itemsize if self.rule.takes_mean else 0
        once = 0 if self.shards else update.once
        return Part(some, update, device, grad_dtype, bytes_per_element, again, once)

    def is_for(self, lists: Lists) -> bool:
        is_counted = addresses(lists[-1]) == self.steps_at
        return is_counted and self.geometry.fits(lists[:-1], self.addresses)

    def fitted(self, grads: Grads) -> Grads | None:
        """The gradients as the updates need them; None if the plan is not for such ones."""
        filled = grads  # a parameter looks as its gradient does, but for the dtype
        if not all_given(grads):
            filled = [p if g is None else g for p, g in zip(self.params, grads, strict=True)]
        if self.expects is not None and self.expects(*filled):
            return grads
        fitted: list[Tensor | None] = []
        for param, grad, dtype in zip(self.params, grads, self.grad_dtypes, strict=True):
            if grad is not None:
                if grad.dtype is not dtype or not belongs(grad, param):
                    return None
                if not same_layout(grad, param) or grad.is_neg() or grad._is_zerotensor():
                    grad = torch.empty_like(param, dtype=dtype).copy_(grad)
            fitted.append(grad)
        dtypes = [tensor.dtype for tensor in filled]  # type: ignore[union-attr]
        if dtypes == self.grad_dtypes and all(map(is_, fitted, grads)):
            self.expects = guard(filled)  # type: ignore[arg-type]
        return fitted

    def __call__(
        self, lists: Lists, grads: Grads, hyper: dict[str, Any],
        factor: Tensor | None = None, skip: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Updates what has a gradient, which counts `factor` times, unless `skip` is not 0."""
        given = None if all_given(grads) else [grad is not None or None for grad in grads]
        self._count(lists[-1], given, skip)
        calls = []
        for part in self.parts:
            own = grads
            if len(part.indices) < len(grads):
                own = [grads[index] for index in part.indices]
            steps: float | Tensor = 0.0
            if self.rule.takes_step or self.origins:
                steps = _common([lists[-1][index] for index in part.indices])
            if self.rule.takes_step:
                hyper = {**hyper, "step": steps}
            noise = self._noise(part.indices, steps)
            calls.append((part, (own, hyper, factor, skip, noise)))
        if self.rule.takes_mean:
            calls = self._with_means(calls)
        for part, arguments in calls:
            part.update(*arguments)
        for index in self.apart:
            grad = grads[index]
            if grad is not None:
                step = float(lists[-1][index]) if self.rule.takes_step or self.origins else 0.0
                given_step = {"step": step} if self.rule.takes_step else {}
                tensors = [self.params[index], *(c and c[index] for c in self.columns)]
                if self.rule.is_split:
                    tensors[-1] = tensors[-1].view(torch.int16)  # type: ignore[union-attr]
                noise = self._noise([index], step)
                bits = [] if noise is None else noise.like(tensors)
                apply(self.rule.eager, grad, tensors, Scratch(), {**hyper, **given_step}, bits)
        # A later backward must notice. What was looked at last is in the processor's cache.
        changed: Any = reversed(lists)
        if given is not None:
            changed = [compress(column, given) for column in lists]
        torch.autograd.graph.increment_version([*chain.from_iterable(changed)])

    def _with_means(self, calls: list[Any]) -> list[Any]:
        """With the means over all ranks; None: each update finds those of its tensors."""
        counts: list[Any] = [None] * len(self.params)
        for part, arguments in calls if self.shards else []:
            for index, value in zip(part.indices, part.update.counts(*arguments), strict=True):
                counts[index] = value
        means = shard.means(counts, self.shards) if self.shards else counts
        made = []
        for part, (own, hyper, *rest) in calls:
            known = None
            if self.shards:
                known = torch.stack([means[index] for index in part.indices])
            made.append((part, (own, {**hyper, "mean": known}, *rest)))
        return made

    def _noise(self, some: Sequence[int], steps: float | Tensor) -> Noise | None:
        if self.origins is None or self.rule.seed is None:
            return None
        origins = [self.origins[index] for index in some]
        return Noise(self.rule.seed, origins, steps, self.rule.is_stochastic)

    def _count(self, steps: Sequence[Tensor], given: Any, skip: Tensor | None) -> None:
        """Adds 1 to the step of every parameter that has a gradient; None: all have."""
        for span in self.joined:
            flat, indices = span.flats[0], range(span.first, span.first + len(span))
            if given is not None and flat.is_cpu:
                counts = [float(given[index] or 0) for index in indices]
                flat.add_(torch.tensor(counts, dtype=flat.dtype, device="cpu") * _one(flat, skip))
                continue
            for (part,) in map(span.part, stretches(indices, given)):
                part.add_(_one(part, skip))
        lone = [steps[i] for i in self.lone if given is None or given[i]]
        if len(lone) > 2 and self.alike:
            torch._foreach_add_(lone, _one(lone[0], skip))
            return
        for step in lone:
            step.add_(_one(step, skip))


def _one(step: Tensor, skip: Tensor | None) -> Any:
    if skip is not None:
        return (skip == 0).to(step)
    return number(1.0, step.dtype) if step.is_cpu and step.is_floating_point() else 1


def _common(steps: Sequence[Tensor]) -> float | Tensor:
    """The number of steps that all took, if the host knows it and it is one; else that of each."""
    counts = torch.stack(list(steps))
    if not counts.is_cpu:
        return counts
    low, high = torch.aminmax(counts)
    return float(low) if low == high else counts
