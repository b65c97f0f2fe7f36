"""Param groups of the same options: which parameters a plan updates, and why torch the others."""

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import _get_capturable_supported_devices

from tritonopt import eligible, precision, quantized
from tritonopt.device import is_capturing, path
from tritonopt.plan import Grads, Lists, Plan, Rule
from tritonopt.scaling import scaled
from tritonopt.shard import is_sharded, local, same_shards
from tritonopt.state import make_state

_CAPTURABLE = _get_capturable_supported_devices()


class Stale(Exception):
    """Something is not as it was when the group was looked at."""


class Group:
    """Neighbouring param groups with the same options, and how their tensors were last found.

    Neighbours are one: one launch, or one sweep, updates all their parameters.
    """

    params: list[Tensor] | None = None  # not looked at yet
    plan: Plan | None = None
    provisional = False  # whether it is to be looked at in any case
    why_in_place: dict[int, str | None]  # by a parameter's id, for a description

    def __init__(self, optimizer: Any, groups: Sequence[dict[str, Any]]) -> None:
        self.optimizer, self.groups = optimizer, groups
        self.options = groups[0]
        self.rule = _precise(optimizer.rule(self.options), self.options)
        self.why_torch: str | None = optimizer._why_torch(self.options)
        self.beyond_torch = optimizer._beyond_torch(self.options)
        self.capturable = bool(self.options.get("capturable"))
        self.state_dtype = self.options.get("state_dtype")  # as it is now
        self.hyper: dict[str, Any] = {} if self.why_torch else optimizer.hyper(self.options)

    def with_options_of(self, other: "Group") -> "Group":
        """This one, if what was found is good for the options of the other one; else that one."""
        mine, theirs = (
            (group.rule._replace(launcher=None),  # type: ignore[arg-type]
             group.why_torch, group.capturable, group.state_dtype)
            for group in (self, other)
        )  # fmt: skip
        # What is left to torch may be so no more, or raise.
        if mine != theirs or (self.params and self.fallback and other.beyond_torch):
            return other
        self.groups, self.options, self.hyper = other.groups, other.options, other.hyper
        self.beyond_torch = other.beyond_torch
        return self

    def current(self) -> list[Tensor]:
        """The parameters that the param groups have now."""
        if len(self.groups) == 1:
            return self.options["params"]  # type: ignore[no-any-return]
        return list(chain.from_iterable(group["params"] for group in self.groups))

    def sort(self, for_a_step: bool = True) -> None:
        """Finds who updates which parameters. Raises what torch raises; nothing is changed."""
        self.params = self.plan = None  # until all is done
        params, state = list(self.current()), self.optimizer.state
        if params and is_capturing(params[0].device):
            raise RuntimeError(
                "parameters, state or options changed since the last step, or there was none: "
                "take one step before a graph captures it"
            )
        self.waiting: list[Tensor] = []  # for a gradient, with which their state is made
        self.bare: list[tuple[Tensor, bool]] = []  # have no state; whether they are native
        self.fallback: list[tuple[Tensor, str]] = []  # left to torch, and why
        self.fitted: dict[Tensor, Any] = {}  # entries that take the place of those in the state
        self.native: list[Tensor] = []
        rows = ([p, *map((state.get(p) or {}).get, self._keys())] for p in params)
        rows = ([local(t) for t in row if isinstance(t, Tensor)] for row in rows)
        shared = set() if self.why_torch else eligible.overlapping(rows)
        for index, param in enumerate(params):
            entry, has_gradient = state.get(param), for_a_step and param.grad is not None
            why = self.why_torch or self._why_not_native(param)
            if for_a_step and entry and why is None:
                entry = self._fitted(param, entry)
                if entry is not state[param]:
                    self.fitted[param] = entry
            missing = [key for key in self._keys() if why is None and entry and key not in entry]
            if has_gradient:
                grad = local(param.grad)
                if grad.layout is not torch.strided:
                    kind = "sparse" if grad.is_sparse else grad.layout
                    raise RuntimeError(f"{self.rule.title} does not support {kind} gradients")
                if missing:
                    raise KeyError(missing[0])
            elif not entry or missing or self.optimizer._is_untrained(entry):
                self.waiting.append(param)
                continue
            if why is None and index in shared:
                why = "overlaps another parameter, or its state does"
            why = why or self._why_left(param, entry)
            if not entry:
                self.bare.append((param, why is None))
            if why is None:
                self.native.append(param)
                continue
            self.fallback.append((param, why))
            if self.beyond_torch and has_gradient:
                raise ValueError(
                    f"{self.beyond_torch} is not in torch's implementation, which is needed for a "
                    f"parameter of size {tuple(param.size())}: it {why}"
                )

    def _why_not_native(self, param: Tensor) -> str | None:
        return self.optimizer._why_not_native(param) or precision.why_not(self.options, param)

    def _keys(self) -> tuple[str, ...]:
        return "step", *self.rule.used

    def _why_left(self, param: Tensor, entry: Mapping[str, Any] | None) -> str | None:
        if self.capturable and param.device.type not in _CAPTURABLE:
            return f"capturable=True is not for {param.device.type}"  # torch raises
        if entry and not isinstance(entry["step"], Tensor):
            return "has a count of steps that is no tensor"  # torch raises
        if not entry:  # it has a gradient then, and this is what its state will be like
            like = param.to(param.grad.dtype)  # type: ignore[union-attr]
            like_gradient = self.optimizer._like_gradient
            entry = {key: like if key in like_gradient else param for key in self.rule.used}
            for key in self.rule.used:
                entry[key] = entry[key].to(self._dtype_of(key, param) or entry[key].dtype)
        if quantized.SCALE in entry and entry[quantized.SCALE].device != param.device:
            return f"has state on {entry[quantized.SCALE].device}"
        special = quantized.CODE, quantized.SCALE, precision.REMAINDER
        codes = [entry[key] for key in self.rule.used if key in (special[0], special[2])]
        states = [entry[key] for key in self.rule.used if key not in special]
        return eligible.why_not_together(param, param.grad, states, codes)

    def _dtype_of(self, key: str, param: Tensor) -> torch.dtype | None:
        return precision.dtype_of(self.options, key, param)

    def _fitted(self, param: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
        """State as the rule and the options take it, of what somebody has loaded or written."""
        entry = self.optimizer._fitted(param, entry)
        return precision.fitted(self.options, param, entry, self.rule.used)

    def make_state(self, params: Sequence[Tensor]) -> None:
        optimizer = self.optimizer
        starts = dict.fromkeys(self.rule.used, 0.0)
        for key in starts.keys() - {precision.REMAINDER}:
            starts[key] = optimizer.initial(key, self.options)
        on_device = self.capturable or optimizer._has_fused_amp()
        like_gradient = optimizer._like_gradient
        make_state(optimizer.state, params, starts, like_gradient, on_device, self._dtype_of)

    def make_plan(self) -> None:
        """Once all that is native has its state."""
        params, state = list(self.current()), self.optimizer.state
        self.entries = list(map(state.get, params))
        self._left = _looks(self.fallback)
        self.provisional = any(why == eligible.BAD_GRADIENT for _, why in self.fallback)
        self.provisional |= bool(self.fallback and self.beyond_torch)
        self.sharded = any(map(is_sharded, self.native))
        self._native_entries = [state[param] for param in self.native]
        keys = (*self.rule.state, "step")
        self._getters = [itemgetter(key) if key in self._keys() else None for key in keys]
        self.lists, grads = self._gather()
        if self.native:
            origins = None if self.rule.seed is None else self._origins()
            self.sizes = self._sizes()
            shards = self.native if self.sharded and self.rule.takes_mean else None
            sweep = self.optimizer._sweep
            self.plan = Plan(self.rule, self.lists, grads, sweep, origins=origins, shards=shards)
        self.params = params

    def _sizes(self) -> list[int]:
        return [len(group["params"]) for group in self.groups]

    def _origins(self) -> list[int]:
        """Where the random bits of native parameters begin."""
        found, mine = {}, {*map(id, self.native)}
        for number, group in enumerate(self.optimizer.param_groups):
            for index, param in enumerate(group["params"]):
                if id(param) in mine:
                    found[id(param)] = precision.origin(number, index, param)
        return [found[id(param)] for param in self.native]

    def _gather(self) -> tuple[Lists, list[Tensor | None]]:
        """What the plan writes, and the gradients."""
        entries, keys = self._native_entries, self.rule.state
        lists = [self.native, *([*map(get, entries)] if get else [] for get in self._getters)]
        grads: Any = [param.grad for param in self.native]
        if self.sharded:
            keyed = zip(lists[1:], keys, strict=False)
            for column in (*(column for column, key in keyed if key != quantized.SCALE), grads):
                pairs = zip(self.native, column, strict=False)
                if not all(t is None or same_shards(param, t) for param, t in pairs):
                    raise Stale
            *lists, grads = ([*map(local, column)] for column in (*lists, grads))
        return lists, grads

    def gradients(self, same_entries: bool) -> Grads:
        """The gradients as the plan needs them, if all is as it was; else raises Stale.

        `same_entries`: the optimizer's state is known to have the same ones for its parameters.
        """
        params, get = self.current(), self.optimizer.state.get
        if self.params is None or len(params) != len(self.params):
            raise Stale
        if not all(map(is_, params, self.params)) or any(p.grad is not None for p in self.waiting):
            raise Stale
        if self.why_torch:
            return []
        if self.plan is not None and self.rule.seed is not None and self._sizes() != self.sizes:
            raise Stale
        if not same_entries and not all(map(is_, map(get, params), self.entries)):
            raise Stale
        if self.fallback and _looks(self.fallback) != self._left:
            raise Stale
        if self.plan is None:
            return []
        try:
            self.lists, grads = self._gather()
            if not self.plan.is_for(self.lists):
                may_follow = not self.fallback and not is_capturing(self.native[0].device)
                self.plan = self.plan.moved(self.lists) if may_follow else None
            fitted = self.plan.fitted(grads) if self.plan is not None else None
        except (KeyError, TypeError, RuntimeError) as error:
            raise Stale from error  # of state that is gone or has no memory
        if fitted is None:
            raise Stale
        return fitted

    def update(self, grads: Grads, factor: Tensor | None, skip: Tensor | None) -> None:
        """A step; `grads` are those for the plan."""
        if self.fallback:
            params = [param for param, _ in self.fallback]
            # By default one after the other, as overlapping tensors need.
            foreach = self.options.get("foreach") or False
            differentiable = self.optimizer.defaults.get("differentiable", False)
            with torch.set_grad_enabled(differentiable), scaled(params, factor):
                self.optimizer.update_by_torch(
                    {**self.options, "params": params, "foreach": foreach}
                )
        if self.plan is not None:
            self.plan(self.lists, grads, self.hyper, factor, skip)
        if self.sharded:  # DTensors have versions of their own
            pairs = zip(self.native, self._native_entries, strict=True)
            rows = [(p, *map(entry.get, self._keys())) for p, entry in pairs if p.grad is not None]
            torch.autograd.graph.increment_version([*chain.from_iterable(rows)])

    def in_kernels(self) -> bool:
        """Whether kernels alone update the parameters."""
        parts = self.plan.parts if self.plan is not None else []
        return not self.fallback and all(path(part.device)[0] == "kernel" for part in parts)

    def expected(self) -> list[tuple[Tensor, str | None]]:
        """Parameters that have no state yet, and why torch will update them, if it will."""
        real = (p for p in self.waiting if not is_lazy(p) and not p.is_meta and p.requires_grad)
        return [(param, self.why_torch or self._why_not_native(param)) for param in real]

    def expected_bytes(self, param: Tensor) -> int:
        """That a step will move of it, if its gradient has its dtype."""
        keys = (key for key in self.rule.used if key != quantized.SCALE)  # 4 bytes a block
        dtypes = (self._dtype_of(key, param) or param.dtype for key in keys)
        states = sum(dtype.itemsize for dtype in dtypes)
        numel, per_element = local(param).numel(), 3 * param.itemsize + 2 * states
        sweep = getattr(self.optimizer._sweep, "func", self.optimizer._sweep)
        once = sweep.once if path(local(param).device)[0] == "eager" else 0
        if self.rule.takes_mean and (is_sharded(param) or numel > once):
            per_element += param.itemsize + states
        return numel * per_element


def _precise(rule: Rule, options: dict[str, Any]) -> Rule:
    """The rule with what the options of `precision` ask for."""
    if options.get("master"):
        rule = rule.with_remainder()
    is_stochastic = bool(options.get("stochastic_rounding"))
    if is_stochastic or rule.is_quantized:
        seed = options.get("rounding_seed", 0)
        rule = rule._replace(seed=seed, is_stochastic=is_stochastic)
    return rule


def _looks(fallback: list[tuple[Tensor, str]]) -> list[tuple[Any, ...]]:
    """What parameters that are left to torch are, and where: other ones may be left to it then."""
    return [
        (p.dtype, p.device, p.size(), p.stride(), p.data_ptr())
        if eligible.is_plain(p) and not p.is_meta
        else (type(p), p.dtype, p.device)
        for p, _ in fallback
    ]
