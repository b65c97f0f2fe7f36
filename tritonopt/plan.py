"""Which launches and sweeps update a list of parameters: found once, verified at every step.

The optimizers and the ops hand over the same thing: lists, as torch's functional optimizers take
them. A plan is good as long as everything that it writes lies where it lay, and as it lay.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from itertools import chain, pairwise
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonopt.device import is_capturing, path
from tritonopt.eager import Scratch, number
from tritonopt.eligible import belongs, same_layout
from tritonopt.slab import is_dense
from tritonopt.span import all_given, spans, stretches
from tritonopt.sweep import Sweep
from tritonopt.verify import addresses, chunks, geometry, guard


class Rule(NamedTuple):
    """What tells one optimizer from the other."""

    title: str  # the optimizer's name in error texts
    eager: Callable[..., None]  # the rule in plain torch
    launcher: Callable[[], Callable[..., None]]  # imports triton and returns what launches kernels
    state: tuple[str, ...]  # keys of all state that the rule takes, in its order
    used: tuple[str, ...]  # of it, what the group's options ask for
    takes_step: bool = False  # whether it takes the number of steps, too


class Lists(NamedTuple):
    """What one step works on; a gradient is None where there is none."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    columns: Sequence[Sequence[Tensor]]  # state, in the order of the rule; empty: not used
    steps: Sequence[Tensor]

    def written(self) -> list[Tensor]:
        return [*self.params, *chain(*self.columns)]


class Part(NamedTuple):
    """What one launch or one sweep updates."""

    indices: list[int]
    update: Any
    device: torch.device
    dtype: torch.dtype
    grad_dtype: torch.dtype
    bytes_per_element: int  # that a step moves at the least


class Plan:
    """The updates of some lists, for as long as their tensors do not move.

    `apart`: indices of parameters to be updated one by one, in order, by the eager rule, as all
    those are whose state has another memory layout.
    """

    def __init__(
        self,
        rule: Rule,
        lists: Lists,
        sweep: Callable[..., Sweep] = Sweep,
        apart: Iterable[int] = (),
    ) -> None:
        self.rule, self.sweep = rule, sweep
        written, indices = lists.written(), range(len(lists.params))
        self.geometry = geometry(written)
        self.nbytes = [t.numel() * t.itemsize for t in written]
        self.guards = [guard(written[where]) for where in chunks(len(written))]
        self.expects: Callable[..., bool] | None = None  # gradients that need no look, one by one
        pairs = zip(lists.params, lists.grads, strict=True)
        self.grad_dtypes = [p.dtype if g is None else g.dtype for p, g in pairs]
        self.apart = sorted({*apart, *(i for i in indices if not _is_in_order(lists, i))})
        self.members: dict[Any, list[int]] = {}  # of each launch or sweep
        for i in indices:
            if i not in self.apart:
                param, states = lists.params[i], [c[i].dtype for c in lists.columns if c]
                kind = param.device, param.dtype, self.grad_dtypes[i], *states
                self.members.setdefault(kind, []).append(i)
        self.steps_at: list[int] | None = None
        self._place(lists)

    def _place(self, lists: Lists) -> None:
        """Makes the launches and sweeps, which know where tensors lie."""
        self.params = lists.params
        self.columns = [column or None for column in lists.columns]
        self.addresses = addresses(lists.written())
        self.parts = [self._part(*kind, some=some) for kind, some in self.members.items()]
        self.steps = [step.detach() for step in lists.steps]
        steps_at = addresses(self.steps)  # scalars: there is no more to look at
        if steps_at != self.steps_at:
            self.steps_at = steps_at
            self.joined, self.lone = spans([self.steps], 2**62, 1)
            kinds = {(step.device, step.dtype) for step in self.steps}
            # Else they are counted one by one: a count of several parameters is counted often.
            self.alike = len(kinds) == 1 and len({*steps_at}) == len(steps_at)

    def moved(self, lists: Lists) -> "Plan | None":
        """The plan of tensors that are what they were and lie elsewhere; None if they are not."""
        written = lists.written()
        if self.apart or not self._has_geometry_of(written):
            return None
        places = sorted(zip(addresses(written), self.nbytes, strict=True))
        if any(start + size > after for (start, size), (after, _) in pairwise(places)):
            return None  # they overlap
        plan = copy(self)
        plan._place(lists)
        return plan

    def _part(
        self,
        device: torch.device,
        dtype: torch.dtype,
        grad_dtype: torch.dtype,
        *states: torch.dtype,
        some: list[int],
    ) -> Part:
        # Other tensors of the same memory: these may be moved.
        params = [self.params[index].detach() for index in some]
        columns = [c and [c[index].detach() for index in some] for c in self.columns]
        update: Any
        if path(device)[0] == "eager":
            update = self.sweep(self.rule.eager, params, columns)
        else:
            from tritonopt.kernels.launch import Launch

            update = Launch(self.rule.launcher(), params, columns)
        moved = 2 * dtype.itemsize + grad_dtype.itemsize + 2 * sum(s.itemsize for s in states)
        return Part(some, update, device, dtype, grad_dtype, moved)

    def gradients(self, lists: Lists) -> Sequence[Tensor | None] | None:
        """The gradients as the updates need them; None if the plan is not for these lists."""
        written, grads = lists.written(), lists.grads
        if addresses(lists.steps) != self.steps_at:
            return None
        if not self._has_geometry_of(written, self.addresses):
            return None
        if self.expects is not None and self.expects(*grads):
            return grads
        fitted: list[Tensor | None] = []
        for param, grad, dtype in zip(self.params, grads, self.grad_dtypes, strict=True):
            if grad is not None:
                if grad.dtype is not dtype or not belongs(grad, param):
                    return None
                if not same_layout(grad, param) or grad.is_neg() or grad._is_zerotensor():
                    grad = torch.empty_like(param, dtype=dtype).copy_(grad)
            fitted.append(grad)
        if all_given(grads) and all(map(is_, fitted, grads)):
            self.expects = guard(grads)  # type: ignore[arg-type]
        return fitted

    def _has_geometry_of(self, written: Sequence[Tensor], at: Sequence[int] = ()) -> bool:
        """Whether the tensors are what they were, and lie `at` these addresses, if given."""
        if len(written) != len(self.geometry):
            return False
        for where, fits in zip(chunks(len(written)), self.guards, strict=True):
            tensors = written[where]
            if at and addresses(tensors) != at[where]:
                return False
            if not fits(*tensors) and geometry(tensors) != self.geometry[where]:
                return False
        return True

    def __call__(
        self,
        grads: Sequence[Tensor | None],
        hyper: dict[str, Any],
        factor: Tensor | None = None,
        skip: Tensor | None = None,
        reserve: bool = False,
    ) -> None:
        """Updates what has a gradient, which counts `factor` times, unless `skip` is not 0.

        `reserve`: sees to it that a graph can capture later steps.
        """
        self._count(grads, skip)
        whole = len(self.parts) == 1 and not self.apart
        for part in self.parts:
            own = grads if whole else [grads[index] for index in part.indices]
            if self.rule.takes_step:
                hyper = {**hyper, "step": _common([self.steps[index] for index in part.indices])}
            part.update(own, hyper, factor, skip)
            if reserve and hasattr(part.update, "reserve") and not is_capturing(part.device):
                part.update.reserve()
        for index in self.apart:
            grad = grads[index]
            if grad is not None:
                step = {"step": float(self.steps[index])} if self.rule.takes_step else {}
                states = [c and c[index] for c in self.columns]
                update_alone(self.rule, self.params[index], grad, states, {**hyper, **step})

    def _count(self, grads: Sequence[Tensor | None], skip: Tensor | None) -> None:
        """Adds 1 to the step of every parameter that has a gradient."""
        whole = all_given(grads)
        keys = None if whole else [None if grad is None else True for grad in grads]
        for span in self.joined:
            for some in stretches(range(span.first, span.first + len(span)), keys):
                (part,) = span.part(some)
                part.add_(_one(part, skip))  # type: ignore[union-attr,arg-type]
        lone = [self.steps[i] for i in self.lone if whole or grads[i] is not None]
        if len(lone) > 2 and self.alike:
            torch._foreach_add_(lone, _one(lone[0], skip))
            return
        for step in lone:
            step.add_(_one(step, skip))


def _is_in_order(lists: Lists, index: int) -> bool:
    """Whether equal offsets are equal elements in the parameter and its state."""
    param = lists.params[index]
    return is_dense(param) and all(same_layout(c[index], param) for c in lists.columns if c)


def update_alone(
    rule: Rule, param: Tensor, grad: Tensor, states: Sequence[Tensor | None], hyper: Any
) -> None:
    """The eager rule over one parameter of any memory layout; in fp32 and rounded once if half."""
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    given = [param.detach(), *states]
    work = [tensor if tensor is None else tensor.to(dtype) for tensor in given]
    rule.eager(work[0], grad.to(dtype), *work[1:], Scratch(), **hyper)
    for tensor, computed in zip(given, work, strict=True):
        if computed is not tensor:
            tensor.copy_(computed)  # type: ignore[union-attr,arg-type]


def _one(step: Tensor, skip: Tensor | None) -> Any:
    if skip is not None:
        return (skip == 0).to(step)
    return number(1.0) if step.is_cpu and step.is_floating_point() else 1


def _common(steps: Sequence[Tensor]) -> float | Tensor:
    """The number of steps that all took, if the host knows it and it is one; else that of each."""
    counts = torch.stack(list(steps))
    if not counts.is_cpu:
        return counts
    low, high = torch.aminmax(counts)
    return float(low) if low == high else counts
