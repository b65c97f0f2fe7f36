"""The updates as operators of torch, which a compiler keeps whole and knows the mutations of.

`torch.ops.tritonopt.rmsprop_` and `rprop_` take lists, as `aten::_fused_adam_` does, and update
parameters and state where they lie. They need none of tritonopt's classes:

    >>> import torch, tritonopt
    >>> params, grads, square_avgs = [torch.ones(3)], [torch.ones(3)], [torch.zeros(3)]
    >>> torch.ops.tritonopt.rmsprop_(params, grads, square_avgs, [], [], [], lr=0.05)
    >>> params
    [tensor([0.5000, 0.5000, 0.5000])]

Positional arguments are lists of tensors. The others are those of :class:`tritonopt.RMSprop` and
:class:`tritonopt.Rprop`, not validated as theirs are; `loss_rose`, since the last step: "irprop+".

    rmsprop_(params, grads, square_avgs, grad_avgs, momentum_buffers, state_steps, remainders=None,
        scales=None, *, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, maximize=False,
        eps_in_sqrt=False, lr_in_momentum=False, nesterov=False, decoupled_weight_decay=False,
        bias_correction=False, nan_safe=False, stochastic_rounding=False, rounding_seed=0,
        cautious=False)
    rprop_(params, grads, prevs, step_sizes, state_steps, remainders=None, *, etaminus=0.5,
        etaplus=1.2, step_size_min=1e-6, step_size_max=50, maximize=False, variant="irprop-",
        loss_rose=False, compact=False, stochastic_rounding=False, rounding_seed=0)

Lists of one call have equal lengths; a list that is not used is empty: `grad_avgs`, which make the
rule the centered one, `momentum_buffers` without momentum, and `prevs` if `compact`: both states of
fp32 parameters are in `step_sizes` then, as `tritonopt.compact.encoded` makes them. With
`remainders`, of int16 and 0 in the beginning, bf16 parameters are as with `master="split"`; with
`scales`, square_avgs are codes, as `tritonopt.quantized.encoded` makes both. 1 is added to each of
`state_steps`, however many there are. Every list may mix devices, dtypes and memory layouts; a
gradient and the state of a parameter have its shape and device, and are all fp64 or all of fp16,
bf16 and fp32. `lr` is a float or a tensor with one element. Where a compiled graph changes other
hyperparameters without being compiled again, they are tensors, too: the overload
`rmsprop_.tensor_hyper`.

Raises:
    ValueError: lengths or shapes differ, an option needs a list that is empty, or no such variant.
    NotImplementedError: tensors that no path takes (complex, sparse, subclasses, devices without
        triton), or a first call inside a graph capture.
"""

import re
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tritonopt import eager, precision, quantized, rmsprop, rprop
from tritonopt.compile.functional import define_twin
from tritonopt.device import is_capturing
from tritonopt.eligible import overlapping, why_not_native, why_not_together
from tritonopt.plan import Lists, Plan, Rule

# Scalar and not float: a float of a schema is a constant to the compiler.
_RMSPROP = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] grad_avgs, "
    "Tensor(d!)[] momentum_buffers, Tensor(e!)[] state_steps, Tensor(f!)[]? remainders=None, "
    "Tensor(g!)[]? scales=None, *, "
    "Scalar lr=1e-2, "
    "Scalar alpha=0.99, Scalar eps=1e-8, Scalar weight_decay=0, Scalar momentum=0, "
    "bool maximize=False, bool eps_in_sqrt=False, bool lr_in_momentum=False, "
    "bool nesterov=False, bool decoupled_weight_decay=False, bool bias_correction=False, "
    "bool nan_safe=False, bool stochastic_rounding=False, int rounding_seed=0, "
    "bool cautious=False) -> ()"
)
_RPROP = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] prevs, Tensor(c!)[] step_sizes, "
    "Tensor(d!)[] state_steps, Tensor(e!)[]? remainders=None, *, Scalar etaminus=0.5, "
    "Scalar etaplus=1.2, "
    "Scalar step_size_min=1e-6, Scalar step_size_max=50, bool maximize=False, "
    'str variant="irprop-", bool loss_rose=False, bool compact=False, '
    "bool stochastic_rounding=False, int rounding_seed=0) -> ()"
)

RULES = {  # each with the state that it needs in any case
    "rmsprop_": Rule("RMSprop", eager.rmsprop_, rmsprop.launcher, rmsprop.STATE, ("square_avg",)),
    "rprop_": rprop.PLAIN,
}

_FP32 = torch.float32
RECENT_PLANS = 4  # which parameters have gradients may alternate between a few patterns
_library = torch.library.Library("tritonopt", "DEF")
_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by the first state tensor


def _update(name: str, defaults: dict[str, Any], *given: list[Tensor], **options: Any) -> None:
    """The op of a name. Torch leaves out the options that equal their defaults."""
    count = 3 + len(RULES[name].state)
    (params, grads, *columns, steps), more = given[:count], given[count:]
    remainders, scales = (*(column or [] for column in more), [], [])[:2]
    if not params:
        return
    hyper = {**defaults, **options}
    if hyper.get("compact") and not columns[0]:
        columns = columns[1:]
    for key, value in hyper.items():
        is_read_there = key == "lr" and isinstance(value, Tensor) and not value.is_cpu
        if not is_read_there and not isinstance(value, (bool, str)) and key != "rounding_seed":
            hyper[key] = float(value)
    rule = _rule(name, (params, *columns, steps), grads, hyper)
    if scales or torch.uint8 in {tensor.dtype for tensor in columns[0]}:
        rule = _quantized(name, rule, params, columns, scales)
        columns = [*columns, scales]
    if remainders:
        rule = _split(name, rule, params, remainders)
        columns = [*columns, remainders]
    lists = params, *columns, steps
    recent = _plans.setdefault(columns[0][0], [])  # gone with the state
    for plan, _ in recent:
        fitted = plan.fitted(grads) if plan.rule == rule and plan.is_for(lists) else None
        if fitted is not None:
            break
    else:
        plan = _plan(name, rule, lists, grads)
        fitted = plan.fitted(grads)
        assert fitted is not None
        recent[:] = [row for row in recent if _is_current(*row)][: RECENT_PLANS - 1]
        recent.insert(0, (plan, [[*map(weakref.ref, column)] for column in lists]))
    plan(lists, fitted, hyper)


def _rule(name: str, lists: Lists, grads: list[Tensor], hyper: dict[str, Any]) -> Rule:
    """The rule that lists and options ask for; raises where one of them would have no effect."""
    params, *columns, steps = lists
    is_compact, variant = hyper.pop("compact", False), hyper.get("variant", "irprop-")
    if is_compact and (len(columns) > 1 or {t.dtype for t in (*params, *columns[0])} != {_FP32}):
        raise ValueError(f"{name}: compact=True needs fp32 tensors, and prevs to be empty")
    rule = rprop.COMPACT if is_compact else RULES[name]
    used = [key for key, column in zip(rule.state, columns, strict=True) if column]
    if variant not in eager.VARIANTS:
        raise ValueError(f"{name}: invalid variant {variant!r}, not one of {eager.VARIANTS}")
    if len({len(params), len(grads), *map(len, filter(None, columns))}) != 1:
        raise ValueError(f"{name} needs lists of equal lengths; lists it does not use are empty")
    if not {*rule.used} <= {*used}:
        raise ValueError(f"{name} needs state for every parameter")
    for key in ("momentum", "nesterov", "lr_in_momentum", "cautious"):
        if hyper.get(key) and not columns[-1]:
            raise ValueError(f"{name} needs momentum_buffers for {key}")
    if hyper.get("nan_safe") and not columns[1]:
        raise ValueError(f"{name} needs grad_avgs for nan_safe")
    takes_step = hyper.pop("bias_correction", False)
    seed, options = hyper.pop("rounding_seed"), {"stochastic_rounding": False}
    options["stochastic_rounding"] = is_stochastic = hyper.pop("stochastic_rounding")
    is_quantized = torch.uint8 in {tensor.dtype for tensor in columns[0]}
    precision.check({**options, "rounding_seed": seed, "quantized": is_quantized})
    why = next(filter(None, (precision.why_not(options, param) for param in params)), None)
    if why is not None:
        raise ValueError(f"{name}: a parameter {why}")
    draws = is_stochastic or is_quantized
    for key, needed in (("bias_correction", takes_step), ("random bits", draws)):
        if needed and len(steps) != len(params):
            raise ValueError(f"{name} needs state_steps for {key}, one for each parameter")
    seed = seed if draws else None
    takes_mean = bool(hyper.get("cautious"))
    return rule._replace(
        used=tuple(used), takes_step=takes_step, takes_mean=takes_mean,
        seed=seed, is_stochastic=is_stochastic,
    )  # fmt: skip


def _quantized(
    name: str, rule: Rule, params: list[Tensor], columns: list[list[Tensor]], scales: list[Tensor]
) -> Rule:
    """The rule whose averages of squares are codes."""
    if columns[1] or rule.takes_mean or torch.float64 in {param.dtype for param in params}:
        raise ValueError(f"{name}: codes go with no grad_avgs, cautious or float64")
    kinds = {code.dtype for code in columns[0]}, {scale.dtype for scale in scales}
    sizes = [(quantized.blocks(param.numel()),) for param in params]
    pairs = zip(scales, params, strict=False)
    if not all(scale.is_contiguous() and scale.device == param.device for scale, param in pairs):
        raise ValueError(f"{name} needs contiguous scales on their parameters' devices")
    if kinds != ({torch.uint8}, {_FP32}) or sizes != [tuple(scale.size()) for scale in scales]:
        raise ValueError(f"{name} needs codes of uint8, and an fp32 scale for each block of them")
    return rule.with_codes()


def _split(name: str, rule: Rule, params: list[Tensor], remainders: list[Tensor]) -> Rule:
    """The rule of parameters in two halves."""
    if len(remainders) != len(params) or rule.is_stochastic:
        raise ValueError(f"{name} needs a remainder for every parameter, and none that is rounded")
    kinds = {param.dtype for param in params}, {remainder.dtype for remainder in remainders}
    if kinds != ({torch.bfloat16}, {torch.int16}):
        raise ValueError(f"{name} needs parameters of bfloat16 and remainders of int16")
    return rule.with_remainder()


def _is_current(plan: Plan, owners: list[list[weakref.ref[Tensor]]]) -> bool:
    """Whether the tensors are alive and have not moved: else a plan only keeps memory."""
    found = [[owner() for owner in column] for column in owners]
    return plan.addresses == [[t if t is None else t.data_ptr() for t in c] for c in found]


def _plan(name: str, rule: Rule, lists: Lists, grads: list[Tensor]) -> Plan:
    params, *columns, steps = lists
    if is_capturing(params[0].device):
        raise NotImplementedError(f"{name} must have run once before a graph captures it")
    rows: list[Any] = list(zip(params, grads, *filter(None, columns), strict=True))
    for index, row in enumerate(rows):
        scale = row[-1 - rule.is_split] if rule.is_quantized else None
        if any(tensor.size() != row[0].size() for tensor in row if tensor is not scale):
            raise ValueError(f"{name}: a gradient or state has not the size of parameter {index}")
        param, grad, *states = (tensor.detach().contiguous() for tensor in row)
        codes = states[:1] if rule.is_quantized else []  # and scales, and a remainder, are apart
        states = states[len(codes) : len(states) - rule.is_split - rule.is_quantized]
        why = why_not_native(param) or why_not_together(param, grad, states, codes)
        if why is not None:
            raise NotImplementedError(f"{name}: parameter {index} {why}")
    if overlapping(row[2:] for row in rows) or overlapping([step] for step in steps):
        raise ValueError(f"{name}: state of different parameters shares memory")
    origins = None
    if rule.seed is not None:
        origins = [precision.origin(0, index, param) for index, param in enumerate(params)]
    apart = overlapping([param] for param in params)
    plan = Plan(rule, lists, grads, apart=apart, origins=origins)
    if rule.is_quantized and plan.apart:
        raise NotImplementedError(f"{name}: codes need dense parameters of their memory layout")
    return plan


def _define(name: str, schema: str) -> None:
    _library.define(name + schema, tags=[torch.Tag.cudagraph_unsafe])
    packet, _, kind = name.partition(".")
    op: Any = getattr(getattr(torch.ops.tritonopt, packet), kind or "default")
    defaults = {x.name: x.default_value for x in op._schema.arguments if x.has_default_value()}
    defaults = {key: value for key, value in defaults.items() if value is not None}  # no lists
    for key in ("CPU", "CUDA", "XPU"):
        _library.impl(name, partial(_update, packet, defaults), key)
    torch.library.register_fake(f"tritonopt::{name}", lambda *_, **__: None, lib=_library)
    define_twin(_library, op, schema)


_define("rmsprop_", _RMSPROP)
_define("rmsprop_.tensor_lr", _RMSPROP.replace("Scalar lr=1e-2", "Tensor lr"))
_define("rmsprop_.tensor_hyper", re.sub(r"Scalar (\w+)=[^,]+", r"Tensor \1", _RMSPROP))
_define("rprop_", _RPROP)
