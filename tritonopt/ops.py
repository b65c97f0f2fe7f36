"""The updates as operators of torch, which a compiler keeps whole and knows the mutations of.

`torch.ops.tritonopt.rmsprop_` and `torch.ops.tritonopt.rprop_` take lists, as `aten::_fused_adam_`
does, and update parameters and state where they lie. They need none of tritonopt's classes:

    >>> import torch, tritonopt
    >>> params, grads, square_avgs = [torch.ones(3)], [torch.ones(3)], [torch.zeros(3)]
    >>> torch.ops.tritonopt.rmsprop_(params, grads, square_avgs, [], [], [], lr=0.05)
    >>> params
    [tensor([0.5000, 0.5000, 0.5000])]

Lists of one call have equal lengths; a list that the rule does not use is empty (`grad_avgs` unless
centered, `momentum_buffers` without momentum). 1 is added to each of `state_steps`, however many
there are. Every list may mix devices, dtypes and memory layouts; a gradient and the state of a
parameter have its shape and device, and are all fp64 or all of fp16, bf16 and fp32. `lr` is a float
or a tensor with one element. Where a compiled graph changes other hyperparameters without being
compiled again, they are tensors, too: the overload `rmsprop_.tensor_hyper`.

Raises:
    ValueError: lists of different lengths, or a shape that is not the parameter's.
    NotImplementedError: tensors that no path takes (complex, sparse, subclasses, devices without
        triton), or a first call inside a graph capture.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tritonopt import eager, slab
from tritonopt.device import is_capturing, path
from tritonopt.gather import Counter, Gather, small
from tritonopt.layout import (
    Guards,
    common_count,
    is_plain,
    overlapping,
    same_layout,
    why_not_native,
    why_not_together,
)
from tritonopt.sweep import Sweep

_RMSPROP = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] grad_avgs, "
    "Tensor(d!)[] momentum_buffers, Tensor(e!)[] state_steps, *, "
)
_SWITCHES = (
    "bool maximize=False, bool eps_in_sqrt=False, bool lr_in_momentum=False, "
    "bool nesterov=False, bool decoupled_weight_decay=False, bool bias_correction=False) -> ()"
)
_SCALARS = (
    f"Scalar alpha=0.99, Scalar eps=1e-8, Scalar weight_decay=0, Scalar momentum=0, {_SWITCHES}"
)
SCHEMAS = {  # Scalar and not float: a float of a schema is a constant to the compiler
    "rmsprop_": f"{_RMSPROP}Scalar lr=1e-2, {_SCALARS}",
    "rmsprop_.tensor_lr": f"{_RMSPROP}Tensor lr, {_SCALARS}",
    "rmsprop_.tensor_hyper": f"{_RMSPROP}Tensor lr, Tensor alpha, Tensor eps, "
    f"Tensor weight_decay, Tensor momentum, {_SWITCHES}",
    "rprop_": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] prevs, Tensor(c!)[] step_sizes, "
    "Tensor(d!)[] state_steps, *, Scalar etaminus=0.5, Scalar etaplus=1.2, "
    "Scalar step_size_min=1e-6, Scalar step_size_max=50, bool maximize=False, "
    'str variant="irprop-", bool loss_rose=False) -> ()',
}

RECENT_PLANS = 4
"""Which parameters have gradients may alternate between a few patterns."""

_library = torch.library.Library("tritonopt", "DEF")
_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by the first state tensor


def rmsprop_(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    grad_avgs: list[Tensor],
    momentum_buffers: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float | Tensor = 1e-2,
    alpha: float | Tensor = 0.99,
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.0,
    momentum: float | Tensor = 0.0,
    maximize: bool = False,
    bias_correction: bool = False,
    **switches: bool,
) -> None:
    columns = [square_avgs, grad_avgs, momentum_buffers]
    _update(
        "rmsprop_", params, grads, columns, state_steps,
        lr=lr if isinstance(lr, Tensor) and not lr.is_cpu else float(lr),
        alpha=float(alpha), eps=float(eps), weight_decay=float(weight_decay),
        momentum=float(momentum), maximize=maximize, counts=bias_correction, **switches,
    )  # fmt: skip


def rprop_(
    params: list[Tensor],
    grads: list[Tensor],
    prevs: list[Tensor],
    step_sizes: list[Tensor],
    state_steps: list[Tensor],
    *,
    etaminus: float = 0.5,
    etaplus: float = 1.2,
    step_size_min: float = 1e-6,
    step_size_max: float = 50.0,
    maximize: bool = False,
    variant: str = "irprop-",
    loss_rose: bool = False,
) -> None:
    _update(
        "rprop_", params, grads, [prevs, step_sizes], state_steps,
        etaminus=float(etaminus), etaplus=float(etaplus), step_size_min=float(step_size_min),
        step_size_max=float(step_size_max), maximize=maximize, variant=variant,
        loss_rose=loss_rose,
    )  # fmt: skip


def _update(
    name: str,
    params: list[Tensor],
    grads: list[Tensor],
    columns: list[list[Tensor]],
    steps: list[Tensor],
    counts: bool = False,
    **hyper: Any,
) -> None:
    if not params:
        return
    first = columns[0][0] if columns[0] else params[0]  # gone with the optimizer, or a new state
    recent = _plans.setdefault(first, [])
    plan = next((p for p in recent if p.fits(name, params, grads, columns, steps)), None)
    if plan is None:
        recent[:] = [p for p in recent if p.is_current()]
        plan = Plan(name, params, grads, columns, steps)
        recent.insert(0, plan)
        del recent[RECENT_PLANS:]
    plan(grads, hyper, counts)
    torch.autograd.graph.increment_version(params)  # a later backward must notice


class Plan:
    """Which launches and sweeps update the tensors of one call, for as long as they do not move."""

    def __init__(
        self,
        name: str,
        params: list[Tensor],
        grads: list[Tensor],
        columns: list[list[Tensor]],
        steps: list[Tensor],
    ) -> None:
        _check(name, params, grads, columns, steps)
        if is_capturing(params[0].device):
            raise NotImplementedError(f"{name} must have run once before a graph captures it")
        self.name = name
        self.lengths = [len(column) for column in (params, grads, *columns, steps)]
        tensors = [*params, *steps, *(t for column in columns for t in column)]
        self.addresses = list(map(Tensor.data_ptr, tensors))
        self._owners = list(map(weakref.ref, tensors))
        self.guards = Guards([*tensors, *grads])
        self.looks = list(map(_look, [*tensors, *grads]))

        # Other tensors of the same memory: the cache would keep its own keys alive.
        self.params = [p.detach() for p in params]
        self.columns = [[t.detach() for t in column] or None for column in columns]
        self.loose = overlapping(self.params)
        self.loose |= {i for i in range(len(params)) if not self._is_in_order(i)}
        self.misfits = [
            i for i, (p, g) in enumerate(zip(params, grads, strict=True))
            if i not in self.loose and (g.is_neg() or not same_layout(g, p))
        ]  # fmt: skip
        self.updates: list[tuple[list[int], Callable[..., None]]] = []
        for some in self._kinds(grads):
            self.updates += self._native(some)
        spans, alone = slab.spans([steps], len(steps), 1, 1) if steps else ([], [])
        self.steps = [flat for span in spans for flat in span.flats if flat is not None]
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

    def fits(
        self,
        name: str,
        params: list[Tensor],
        grads: list[Tensor],
        columns: list[list[Tensor]],
        steps: list[Tensor],
    ) -> bool:
        if self.name != name or self.lengths != [len(c) for c in (params, grads, *columns, steps)]:
            return False
        tensors = [*params, *steps, *(t for column in columns for t in column)]
        if list(map(Tensor.data_ptr, tensors)) != self.addresses:
            return False
        tensors += grads
        return self.guards.fit(tensors) or list(map(_look, tensors)) == self.looks

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


def _look(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.size(), tensor.stride(), tensor.is_neg()


def _check(name: str, params: Any, grads: Any, columns: Any, steps: Any) -> None:
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


def _fake(*args: Any, **kwargs: Any) -> None:
    """Nothing is returned; what is written is in the schema."""


for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=[torch.Tag.cudagraph_unsafe])
    _implementation = rmsprop_ if _name.startswith("rmsprop_") else rprop_
    for _key in ("CPU", "CUDA", "XPU"):
        _library.impl(_name, _implementation, _key)
    torch.library.register_fake(f"tritonopt::{_name}", _fake, lib=_library)
