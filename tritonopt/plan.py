"""Which launches and sweeps one call of an operator takes: found once, verified at every call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonopt import eager, slab
from tritonopt.bucket import common_count
from tritonopt.device import is_capturing, path
from tritonopt.eligible import (
    is_plain,
    overlapping,
    same_layout,
    why_not_native,
    why_not_together,
)
from tritonopt.gather import Counter, Gather, small
from tritonopt.span import spans
from tritonopt.sweep import Sweep
from tritonopt.verify import Guards, addresses, geometry


class Call(NamedTuple):
    """Of an operator."""

    name: str
    params: list[Tensor]
    grads: list[Tensor]
    columns: list[list[Tensor]]
    steps: list[Tensor]

    def lengths(self) -> list[int]:
        return [len(column) for column in (self.params, self.grads, *self.columns, self.steps)]

    def written(self) -> list[Tensor]:
        return [*self.params, *self.steps, *chain(*self.columns)]


class Plan:
    """Which launches and sweeps update the tensors of one call, for as long as they do not move."""

    def __init__(self, call: Call) -> None:
        _check(call)
        name, params, grads, columns, steps = call
        if is_capturing(params[0].device):
            raise NotImplementedError(f"{name} must have run once before a graph captures it")
        self.name = name
        self.lengths = call.lengths()
        tensors = call.written()
        self.addresses = addresses(tensors)
        self._owners = list(map(weakref.ref, tensors))
        self.guards = Guards([*tensors, *grads])
        self.geometry = geometry([*tensors, *grads])

        # Other tensors of the same memory: the cache would keep its own keys alive.
        self.params = [p.detach() for p in params]
        self.columns = [[t.detach() for t in column] or None for column in columns]
        self.loose = overlapping([param] for param in self.params)
        self.loose |= {i for i in range(len(params)) if not self._is_in_order(i)}
        self.misfits = [
            i for i, (p, g) in enumerate(zip(params, grads, strict=True))
            if i not in self.loose and (g.is_neg() or not same_layout(g, p))
        ]  # fmt: skip
        self.updates: list[tuple[list[int], Callable[..., None]]] = []
        for some in self._kinds(grads):
            self.updates += self._native(some)
        joined, alone = spans([steps], len(steps), 1, 1) if steps else ([], [])
        self.steps = [flat for span in joined for flat in span.flats if flat is not None]
        self.counts = [t.detach() for t in steps]
        lone = [self.counts[index] for index in alone]
        homes = {(t.device, t.dtype) for t in lone}
        self.lone_steps = [
            Counter([t for t in lone if (t.device, t.dtype) == home]) for home in homes
        ]

    def _is_in_order(self, index: int) -> bool:
        """Whether equal offsets are equal elements in the parameter and its state."""
        param = self.params[index]
        states = [column[index] for column in self.columns if column]
        return slab.is_dense(param) and all(same_layout(state, param) for state in states)

    def _kinds(self, grads: Sequence[Tensor]) -> list[list[int]]:
        """Indices of the tensors that one launch can take, for each launch."""
        members: dict[Any, list[int]] = {}
        for index, (param, grad) in enumerate(zip(self.params, grads, strict=True)):
            if index not in self.loose:
                dtypes = [c and c[index].dtype for c in self.columns]
                key = (param.device, param.dtype, grad.dtype, *dtypes)
                members.setdefault(key, []).append(index)
        return list(members.values())

    def _native(self, some: list[int]) -> list[tuple[list[int], Callable[..., None]]]:
        def of(some: list[int]) -> tuple[list[Tensor], list[Any]]:
            columns = [column and [column[index] for index in some] for column in self.columns]
            return [self.params[index] for index in some], columns

        update = _native(self.name, *of(some))
        if not isinstance(update, Sweep):
            return [(some, update)]
        gathered = [some[i] for i in small(update, [self.params[index] for index in some])]
        if not gathered:
            return [(some, update)]
        others = [index for index in some if index not in {*gathered}]
        apart = (gathered, Gather(getattr(eager, self.name), *of(gathered)))
        return [apart, *([(others, _native(self.name, *of(others)))] if others else [])]

    def fits(self, call: Call) -> bool:
        if self.name != call.name or self.lengths != call.lengths():
            return False
        tensors = call.written()
        if addresses(tensors) != self.addresses:
            return False
        tensors += call.grads
        return self.guards.fit(tensors) or geometry(tensors) == self.geometry

    def is_current(self) -> bool:
        """Whether its tensors are alive and have not moved: else it only keeps memory."""
        tensors = [owner() for owner in self._owners]
        alive = all(tensor is not None for tensor in tensors)
        return alive and [t.data_ptr() for t in tensors if t is not None] == self.addresses

    def __call__(self, grads: Sequence[Tensor], hyper: dict[str, Any], counts: bool) -> None:
        for flat in self.steps:
            flat += 1
        for count in self.lone_steps:
            count()
        if self.misfits:
            grads = list(grads)
            for index in self.misfits:
                like = torch.empty_like(self.params[index], dtype=grads[index].dtype)
                grads[index] = like.copy_(grads[index])
        for some, update in self.updates:
            step = {"step": common_count([self.counts[i] for i in some])} if counts else {}
            update([grads[index] for index in some], **hyper, **step)
            if hasattr(update, "reserve") and not is_capturing(grads[some[0]].device):
                update.reserve()
        for index in sorted(self.loose):
            step = {"step": common_count([self.counts[index]])} if counts else {}
            self._update_copies(index, grads[index], {**hyper, **step})

    def _update_copies(self, index: int, grad: Tensor, hyper: dict[str, Any]) -> None:
        param, states = self.params[index], [c and c[index] for c in self.columns]
        given = [param, *states]
        work = [t if t is None else t.clone(memory_format=torch.contiguous_format) for t in given]
        assert work[0] is not None
        update = _native(self.name, [work[0]], [None if t is None else [t] for t in work[1:]])
        update([grad.clone(memory_format=torch.contiguous_format)], **hyper)
        for tensor, computed in zip(given, work, strict=True):
            if tensor is not None and computed is not None:
                tensor.copy_(computed)


def _native(name: str, params: list[Tensor], columns: list[Any]) -> Callable[..., None]:
    if path(params[0].device)[0] == "eager":
        return Sweep(getattr(eager, name), params, columns)
    from tritonopt.kernels import launch

    return launch.Launch(getattr(launch, name), params, columns)


def _check(call: Call) -> None:
    name, params, grads, columns, steps = call
    used = [column for column in columns if column]
    if {len(params)} != {len(column) for column in (params, grads, *used)}:
        raise ValueError(f"{name} needs lists of equal lengths; lists it does not use are empty")
    required = columns[:1] if name == "rmsprop_" else columns
    if len([c for c in required if c]) != len(required):
        raise ValueError(f"{name} needs state for every parameter")
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        states = [column[index] for column in used]
        if any(tensor.size() != param.size() for tensor in (grad, *states)):
            raise ValueError(f"{name}: a gradient or state has not the size of parameter {index}")
        why = _why_not(param, grad, states)
        if why is not None:
            raise NotImplementedError(f"{name}: parameter {index} {why}")
    if overlapping(zip(*used, strict=True)) or overlapping([step] for step in steps):
        raise ValueError(f"{name}: state of different parameters shares memory")


def _why_not(param: Tensor, grad: Tensor, states: list[Tensor]) -> str | None:
    if not is_plain(param):
        return why_not_native(param)
    if grad.layout is not torch.strided:
        return f"has a {grad.layout} gradient"
    if not all(map(is_plain, states)):
        return "has state that is not a plain tensor"
    param = param.detach().contiguous()
    return why_not_native(param) or why_not_together(
        param, grad.detach(), [state.contiguous() for state in states]
    )
