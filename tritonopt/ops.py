"""The updates as operators of torch, which a compiler keeps whole and knows the mutations of.

`torch.ops.tritonopt.rmsprop_` and `torch.ops.tritonopt.rprop_` take lists, as `aten::_fused_adam_`
does, and update parameters and state where they lie. They need none of tritonopt's classes:

    >>> import torch, tritonopt
    >>> params, grads, square_avgs = [torch.ones(3)], [torch.ones(3)], [torch.zeros(3)]
    >>> torch.ops.tritonopt.rmsprop_(params, grads, square_avgs, [], [], [], lr=0.05)
    >>> params
    [tensor([0.5000, 0.5000, 0.5000])]

Positional arguments, each a list of tensors:

    rmsprop_(params, grads, square_avgs, grad_avgs, momentum_buffers, state_steps)
    rprop_(params, grads, prevs, step_sizes, state_steps)

Keyword arguments, as of :class:`tritonopt.RMSprop` and :class:`tritonopt.Rprop`, none of which is
validated as theirs are:

    rmsprop_: lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, maximize=False,
        eps_in_sqrt=False, lr_in_momentum=False, nesterov=False, decoupled_weight_decay=False,
        bias_correction=False
    rprop_: etaminus=0.5, etaplus=1.2, step_size_min=1e-6, step_size_max=50, maximize=False,
        variant="irprop-", loss_rose=False (since the last step, for "irprop+")

Lists of one call have equal lengths; a list that is not used is empty: `grad_avgs`, which make the
rule the centered one, and `momentum_buffers` without momentum. 1 is added to each of `state_steps`,
however many there are; `bias_correction` needs one for each parameter. Every list may mix devices,
dtypes and memory layouts; a gradient and the state of a parameter have its shape and device, and
are all fp64 or all of fp16, bf16 and fp32. `lr` is a float or a tensor with one element. Where a
compiled graph changes other hyperparameters without being compiled again, they are tensors, too:
the overload `rmsprop_.tensor_hyper`.

Raises:
    ValueError: lists of different lengths, a shape that is not the parameter's, a list that an
        option needs is empty, or there is no such variant.
    NotImplementedError: tensors that no path takes (complex, sparse, subclasses, devices without
        triton), or a first call inside a graph capture.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import compute_overlapping_tensors
from torch._ops import OpOverload
from torch.utils.weak import WeakTensorKeyDictionary

from tritonopt import eager, rmsprop, rprop
from tritonopt.device import is_capturing
from tritonopt.eager import VARIANTS
from tritonopt.eligible import is_plain, overlapping, why_not_native, why_not_together
from tritonopt.plan import Lists, Plan, Rule

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

RMSPROP = Rule("RMSprop", eager.rmsprop_, rmsprop.launcher, rmsprop.STATE, ("square_avg",))
RPROP = Rule("Rprop", eager.rprop_, rprop.launcher, rprop.STATE, rprop.STATE)

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
    if params and not momentum_buffers:
        given = {"momentum": momentum, **switches}
        for name in ("momentum", "nesterov", "lr_in_momentum"):
            if given.get(name):
                raise ValueError(f"rmsprop_ needs momentum_buffers for {name}")
    if bias_correction and len(state_steps) != len(params):
        raise ValueError("rmsprop_ needs state_steps for bias_correction, one for each parameter")
    columns = [square_avgs, grad_avgs, momentum_buffers]
    rule = RMSPROP._replace(takes_step=bias_correction)
    _update(
        rule, Lists(params, grads, columns, state_steps),
        lr=lr if isinstance(lr, Tensor) and not lr.is_cpu else float(lr),
        alpha=float(alpha), eps=float(eps), weight_decay=float(weight_decay),
        momentum=float(momentum), maximize=maximize, **switches,
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
    if variant not in VARIANTS:
        raise ValueError(f"rprop_: invalid variant {variant!r}, not one of {VARIANTS}")
    _update(
        RPROP, Lists(params, grads, [prevs, step_sizes], state_steps),
        etaminus=float(etaminus), etaplus=float(etaplus), step_size_min=float(step_size_min),
        step_size_max=float(step_size_max), maximize=maximize, variant=variant,
        loss_rose=loss_rose,
    )  # fmt: skip


def _update(rule: Rule, lists: Lists, **hyper: Any) -> None:
    if not lists.params:
        return
    states = lists.columns[0] or lists.params
    recent = _plans.setdefault(states[0], [])  # gone with the optimizer, or a new state
    lengths = [len(lists.grads), *map(len, lists.columns)]
    for plan, kind, _ in recent:
        if kind == (rule, lengths):
            grads = plan.gradients(lists)
            if grads is not None:
                break
    else:
        recent[:] = [known for known in recent if _is_current(known[0], known[2])]
        plan = _plan(rule, lists)
        grads = plan.gradients(lists)
        assert grads is not None
        owners = [weakref.ref(tensor) for tensor in lists.written()]
        recent.insert(0, (plan, (rule, lengths), owners))
        del recent[RECENT_PLANS:]
    plan(grads, hyper, reserve=True)
    written = [*lists.written(), *lists.steps]
    torch.autograd.graph.increment_version(written)  # a later backward must notice


def _is_current(plan: Plan, owners: list[weakref.ref[Tensor]]) -> bool:
    """Whether the tensors are alive and have not moved: else a plan only keeps memory."""
    found = [owner() for owner in owners]
    return [None if t is None else t.data_ptr() for t in found] == plan.addresses


def _plan(rule: Rule, lists: Lists) -> Plan:
    params, columns, steps = lists.params, lists.columns, lists.steps
    grads: Any = lists.grads
    name = f"{rule.title.lower()}_"
    used = [column for column in columns if column]
    if {len(params)} != {len(column) for column in (params, grads, *used)}:
        raise ValueError(f"{name} needs lists of equal lengths; lists it does not use are empty")
    if not all(column for key, column in zip(rule.state, columns, strict=True) if key in rule.used):
        raise ValueError(f"{name} needs state for every parameter")
    if is_capturing(params[0].device):
        raise NotImplementedError(f"{name} must have run once before a graph captures it")
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        states = [column[index] for column in used]
        if any(tensor.size() != param.size() for tensor in (grad, *states)):
            raise ValueError(f"{name}: a gradient or state has not the size of parameter {index}")
        why = _why_not(param, grad, states)
        if why is not None:
            raise NotImplementedError(f"{name}: parameter {index} {why}")
    if overlapping(zip(*used, strict=True)) or overlapping([step] for step in steps):
        raise ValueError(f"{name}: state of different parameters shares memory")
    # Other tensors of the same memory: the cache would keep its own keys alive.
    others: list[Any] = [[t.detach() for t in column] for column in (params, *columns, steps)]
    alike = Lists(others[0], grads, others[1:-1], others[-1])
    return Plan(rule, alike, apart=overlapping([param] for param in params))


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


# Compilers see the op as one that returns what it writes: which value was read before it, and which
# after it, is then said by the graph, and nobody has to find out.


def _functionalize(overload: OpOverload, context: Any, *lists: Any, **hyper: Any) -> None:
    """What a graph gets in place of the op: its functional twin, and the results as new values."""
    given = context.unwrap_tensors((lists, hyper))
    _check_aliases(*given)
    with context.redispatch_to_next():
        results = _twin(overload)(*given[0], **given[1])
    written = _written(lists)
    for tensor, result in zip(written, results, strict=True):
        context.replace(tensor, result)
        context.commit_update(tensor)
        context.sync(tensor)
    torch.autograd.graph.increment_version(written)  # a backward in the graph must notice


def _twin(overload: OpOverload) -> OpOverload:
    packet = getattr(torch.ops.tritonopt, overload._opname.removesuffix("_"))
    return getattr(packet, overload._overloadname)  # type: ignore[no-any-return]


def _written(lists: Sequence[list[Tensor]]) -> list[Tensor]:
    return [tensor for number, column in enumerate(lists) if number != 1 for tensor in column]


def _check_aliases(lists: Sequence[list[Tensor]], hyper: dict[str, Any]) -> None:
    """Raises where the order of the writes would matter, which a graph does not keep."""
    owners: dict[Any, list[Tensor]] = {}
    for tensor in _written(lists):
        owners.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    shared = [same for same in owners.values() if len(same) > 1]
    reads = [*lists[1], *(x for x in hyper.values() if isinstance(x, Tensor))]
    for tensor in reads:
        if tensor.untyped_storage()._cdata in owners:
            shared += [[other, tensor] for other in owners[tensor.untyped_storage()._cdata]]
    if any(compute_overlapping_tensors(same) for same in shared):
        raise NotImplementedError(
            "tritonopt: in a compiled graph, what an op writes may share memory with nothing else "
            "that it takes"
        )


def _functional(overload: OpOverload, *lists: Any, **hyper: Any) -> list[Tensor]:
    params, grads, *others = lists
    params, *others = [[tensor.clone() for tensor in column] for column in (params, *others)]
    overload(params, grads, *others, **hyper)
    return [*params, *(tensor for column in others for tensor in column)]


def _functional_fake(*lists: Any, **hyper: Any) -> list[Tensor]:
    if "torch._inductor.lowering" in sys.modules:  # the graph may become one of Inductor's
        from tritonopt.compile import lowering

        lowering.register()
    return [torch.empty_like(tensor) for tensor in _written(lists)]


def _fake(*args: Any, **kwargs: Any) -> None:
    """Nothing is returned; what is written is in the schema."""


for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=[torch.Tag.cudagraph_unsafe])
    _implementation = rmsprop_ if _name.startswith("rmsprop_") else rprop_
    for _key in ("CPU", "CUDA", "XPU"):
        _library.impl(_name, _implementation, _key)
    torch.library.register_fake(f"tritonopt::{_name}", _fake, lib=_library)

    _packet, _, _kind = _name.partition(".")
    _overload = getattr(getattr(torch.ops.tritonopt, _packet), _kind or "default")
    _overload.py_functionalize_impl(partial(_functionalize, _overload))
    _name = _name.replace("_", "", 1)
    _schema = re.sub(r"\(\w!\)", "", _schema).replace("-> ()", "-> Tensor[]")
    _library.define(_name + _schema, tags=[torch.Tag.cudagraph_unsafe])
    _library.impl(_name, partial(_functional, _overload), "CompositeExplicitAutograd")
    torch.library.register_fake(f"tritonopt::{_name}", _functional_fake, lib=_library)
