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

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.weak import WeakTensorKeyDictionary

from tritonopt import eager, rmsprop, rprop
from tritonopt.compile.functional import define_twin
from tritonopt.device import is_capturing
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

RULES = {
    "rmsprop_": Rule("RMSprop", eager.rmsprop_, rmsprop.launcher, rmsprop.STATE, ("square_avg",)),
    "rprop_": Rule("Rprop", eager.rprop_, rprop.launcher, rprop.STATE, rprop.STATE),
}

_library = torch.library.Library("tritonopt", "DEF")
_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by the first state tensor


def _update(name: str, defaults: dict[str, Any], *given: list[Tensor], **options: Any) -> None:
    """The op of a name. Torch leaves out the options that equal their defaults."""
    params, grads, *columns, steps = given
    lists = params, *columns, steps
    hyper = {key: _value(key, value) for key, value in {**defaults, **options}.items()}
    _check(name, lists, hyper)
    if not params:
        return
    rule = RULES[name]._replace(takes_step=hyper.pop("bias_correction", False))
    recent = _plans.setdefault((columns[0] or params)[0], [])  # gone with the state
    kind = rule, [len(column) for column in (grads, *columns)]
    for plan, known, _ in recent:
        fitted = plan.fitted(grads) if known == kind and plan.is_for(lists) else None
        if fitted is not None:
            break
    else:
        recent[:] = [row for row in recent if _is_current(row[0], row[2])]
        plan = _plan(rule, lists, grads)
        fitted = plan.fitted(grads)
        assert fitted is not None
        recent.insert(0, (plan, kind, [[*map(weakref.ref, column)] for column in lists]))
        del recent[RECENT_PLANS:]
    plan(lists, fitted, hyper, reserve=True)


def _value(name: str, value: Any) -> Any:
    """A switch as it is, a number as a float; a kernel reads the lr where it lies."""
    is_read_there = name == "lr" and isinstance(value, Tensor) and not value.is_cpu
    return value if is_read_there or isinstance(value, (bool, str)) else float(value)


def _check(name: str, lists: Lists, hyper: dict[str, Any]) -> None:
    """Raises where an option would have no effect."""
    if hyper.get("variant", "irprop-") not in eager.VARIANTS:
        variant = hyper["variant"]
        raise ValueError(f"{name}: invalid variant {variant!r}, not one of {eager.VARIANTS}")
    if hyper.get("bias_correction") and len(lists[-1]) != len(lists[0]):
        raise ValueError(f"{name} needs state_steps for bias_correction, one for each parameter")
    for key in ("momentum", "nesterov", "lr_in_momentum"):
        if lists[0] and hyper.get(key) and not lists[-2]:
            raise ValueError(f"{name} needs momentum_buffers for {key}")


def _is_current(plan: Plan, owners: list[list[weakref.ref[Tensor]]]) -> bool:
    """Whether the tensors are alive and have not moved: else a plan only keeps memory."""
    found = [[owner() for owner in column] for column in owners]
    return [
        [t if t is None else t.data_ptr() for t in column] for column in found
    ] == plan.addresses


def _plan(rule: Rule, lists: Lists, grads: list[Tensor]) -> Plan:
    params, *columns, steps = lists
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
    return Plan(rule, lists, grads, apart=overlapping([param] for param in params))


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


def _define(name: str, schema: str) -> None:
    _library.define(name + schema, tags=[torch.Tag.cudagraph_unsafe])
    packet, _, kind = name.partition(".")
    overload: OpOverload = getattr(getattr(torch.ops.tritonopt, packet), kind or "default")
    arguments = [x for x in overload._schema.arguments if x.kwarg_only and x.has_default_value()]
    defaults = {x.name: x.default_value for x in arguments}
    for key in ("CPU", "CUDA", "XPU"):
        _library.impl(name, partial(_update, packet, defaults), key)
    # Nothing is returned; what is written is in the schema.
    torch.library.register_fake(f"tritonopt::{name}", lambda *_, **__: None, lib=_library)
    define_twin(_library, overload, schema)


for _name, _schema in SCHEMAS.items():
    _define(_name, _schema)
