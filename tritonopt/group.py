"""Param groups of the same options: which parameters a plan updates, and why torch the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import _get_capturable_supported_devices

from tritonopt.eligible import (
    BAD_GRADIENT,
    is_plain,
    overlapping,
    why_not_native,
    why_not_together,
)
from tritonopt.plan import Lists, Plan, Rule
from tritonopt.shard import is_sharded, local, locals_of, same_shards
from tritonopt.sweep import Sweep

_CAPTURABLE = _get_capturable_supported_devices()


class Stale(Exception):
    """Something is not as it was when the group was looked at."""


class Group:
    """One or several param groups with the same options as they were when last looked at."""

    def __init__(
        self,
        rule: Rule,
        group: Mapping[str, Any],
        params: list[Tensor],
        state: Mapping[Tensor, Any],
        why_torch: str | None,
        untrained: Callable[[Mapping[str, Any] | None], bool],
        sweep: Callable[..., Sweep],
    ) -> None:
        self.rule, self.why_torch = rule, why_torch
        self.params = params
        self.waiting: list[Tensor] = []  # for a gradient, with which their state is made
        self.fallback: list[tuple[Tensor, str]] = []  # left to torch, and why
        self.native: list[Tensor] = []
        self.entries: list[Mapping[str, Any]] = []  # state of these
        self.plan: Plan | None = None
        self.provisional = self.sharded = False
        if why_torch:
            self.fallback = [(param, why_torch) for param in self.params]
            self.waiting = [p for p in self.params if p.grad is None and untrained(state.get(p))]
            return
        rows = [self._row(param, state.get(param)) for param in self.params]
        shared = overlapping(rows)
        for index, param in enumerate(self.params):
            entry = state.get(param)
            why = why_not_native(param)
            if param.grad is None and (not entry or untrained(entry)):
                self.waiting.append(param)
                continue
            if why is None and group["capturable"] and param.device.type not in _CAPTURABLE:
                why = f"capturable=True is not for {param.device.type}"  # torch raises
            if why is None and index in shared:
                why = "overlaps another parameter, or its state does"
            why = why or self._why_not_counted(entry)
            if why is None:
                assert entry is not None
                states = [entry[key] for key in rule.used]
                why = why_not_together(param, param.grad, states)
            if why is None:
                assert entry is not None
                self.native.append(param)
                self.entries.append(entry)
            else:
                self.fallback.append((param, why))
        self.provisional = any(why == BAD_GRADIENT for _, why in self.fallback)
        self._left = _looks(self.fallback)
        self.sharded = any(map(is_sharded, self.native))
        if self.native:
            with torch.inference_mode(False):
                self.plan = Plan(rule, self.lists(), sweep)

    def _row(self, param: Tensor, entry: Mapping[str, Any] | None) -> list[Tensor]:
        found = [param, *map((entry or {}).get, ("step", *self.rule.used))]
        return [local(tensor) for tensor in found if isinstance(tensor, Tensor)]

    def _why_not_counted(self, entry: Mapping[str, Any] | None) -> str | None:
        if not entry or not entry.keys() >= {"step", *self.rule.used}:
            return "lacks some of its state"  # torch raises
        if not isinstance(entry["step"], Tensor):
            return "has a count of steps that is no tensor"  # torch raises
        return None

    def lists(self) -> Lists:
        """What a step works on now. Raises Stale where the group must be looked at again."""
        entries, used = self.entries, self.rule.used
        params: Sequence[Tensor] = self.native
        grads: Sequence[Any] = [p.grad for p in params]
        try:
            steps = list(map(itemgetter("step"), entries))
            columns: list[Sequence[Any]] = [
                list(map(itemgetter(key), entries)) if key in used else []
                for key in self.rule.state
            ]
        except KeyError as error:
            raise Stale from error
        if self.sharded:
            for param, *others in zip(params, grads, *filter(None, columns), strict=True):
                if not all(t is None or same_shards(param, t) for t in others):
                    raise Stale
            columns = [locals_of(column, True) for column in columns]
            params, grads = locals_of(params, True), locals_of(grads, True)
        return Lists(params, grads, columns, steps)

    def gradients(
        self, params: Sequence[Tensor], state: Mapping[Tensor, Any] | None
    ) -> Sequence[Tensor | None]:
        """The gradients as the plan needs them, if the group is as it was; else raises Stale.

        `state` None: it is known to hold the same entries.
        """
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            raise Stale
        if self.provisional or (self.waiting and any(p.grad is not None for p in self.waiting)):
            raise Stale
        if self.why_torch:
            return []
        if state is not None and not all(map(is_, map(state.get, self.native), self.entries)):
            raise Stale
        if self.fallback and (state is not None or _looks(self.fallback) != self._left):
            raise Stale
        if self.plan is None:
            return []
        try:
            grads = self.plan.gradients(self.lists())
        except (TypeError, AttributeError, RuntimeError) as error:  # no tensor, or no memory
            raise Stale from error
        if grads is None:
            raise Stale
        return grads

    def expected(self) -> list[Tensor]:
        """Parameters that a plan will take, once they have a gradient and state."""
        real = [p for p in self.waiting if not is_lazy(p) and not p.is_meta and p.requires_grad]
        return [p for p in real if why_not_native(p) is None]


def _looks(fallback: list[tuple[Tensor, str]]) -> list[tuple[Any, ...]]:
    """What parameters that are left to torch are, and where: other ones may be left to it then."""
    return [
        (p.dtype, p.device, p.size(), p.stride(), p.data_ptr())
        if is_plain(p) and not p.is_meta
        else (type(p), p.dtype, p.device)
        for p, _ in fallback
    ]
