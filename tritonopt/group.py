"""Param groups of the same options: which parameters a plan updates, and why torch the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import _get_capturable_supported_devices

from tritonopt.device import is_capturing, path
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

_get_step = itemgetter("step")
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
            if why is None:
                is_bare = not entry or not entry.keys() >= {"step", *rule.used}
            else:
                is_bare = not entry and param.grad is None
            if is_bare or (param.grad is None and untrained(entry)):
                self.waiting.append(param)
                continue
            if why is None and group.get("capturable") and param.device.type not in _CAPTURABLE:
                why = f"capturable=True is not for {param.device.type}"  # torch raises
            if why is None and index in shared:
                why = "overlaps another parameter, or its state does"
            if why is None and not isinstance(entry["step"], Tensor):  # type: ignore[index]
                why = "has a count of steps that is no tensor"  # torch raises
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
        self._getters = [itemgetter(key) for key in rule.state if key in rule.used]
        if self.native:
            with torch.inference_mode(False):
                self.plan = Plan(rule, self.lists(), sweep)

    def _row(self, param: Tensor, entry: Mapping[str, Any] | None) -> list[Tensor]:
        found = [param, *map((entry or {}).get, ("step", *self.rule.used))]
        return [local(tensor) for tensor in found if isinstance(tensor, Tensor)]

    def lists(self) -> Lists:
        entries, used = self.entries, self.rule.used
        columns = [
            [entry[key] for entry in entries] if key in used else [] for key in self.rule.state
        ]
        steps = [entry["step"] for entry in entries]
        grads = [p.grad for p in self.native]
        if not self.sharded:
            return Lists(self.native, grads, columns, steps)
        for param, *others in zip(self.native, grads, *filter(None, columns), strict=True):
            if not all(t is None or same_shards(param, t) for t in others):
                raise Stale
        whole = self.native, grads, [locals_of(column, True) for column in columns], steps
        return Lists(locals_of(whole[0], True), locals_of(whole[1], True), *whole[2:])

    def gradients(
        self, params: Sequence[Tensor], state: Mapping[Tensor, Any] | None
    ) -> Sequence[Tensor | None]:
        """The gradients as the plan needs them, if all is as it was; else raises Stale.

        `state` None: it is known to hold the same entries.
        """
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            raise Stale
        if self.waiting and any(p.grad is not None for p in self.waiting):
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
            if self.sharded:
                lists = self.lists()
                grads = self.plan.gradients(lists.grads, lists.written(), lists.steps)
                self._written: Any = (self.native, [])  # DTensors have versions of their own
            else:
                steps = list(map(_get_step, self.entries))
                written = [*self.native]  # tuples of each entry's would wake the garbage collector
                for get in self._getters:
                    written += map(get, self.entries)
                grads = self.plan.gradients([p.grad for p in self.native], written, steps)
                self._written = written, steps
            if grads is None and not self.fallback and not is_capturing(self.native[0].device):
                lists = self.lists()
                self.plan = self.plan.moved(lists) or self.plan
                grads = self.plan.gradients(lists.grads, lists.written(), lists.steps)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise Stale from error  # of state that is gone, no tensor, or has no memory
        if grads is None:
            raise Stale
        return grads

    def written(self, grads: Sequence[Tensor | None] | None) -> list[Tensor]:
        """Parameters, state and counts of steps that an update writes; None: there are all."""
        columns, steps = self._written
        tensors = [*columns, *steps]
        if grads is None:
            return tensors[::-1]  # what was looked at last is in the processor's cache
        return [t for t, grad in zip(tensors, cycle(grads), strict=False) if grad is not None]

    def in_kernels(self) -> bool:
        """Whether kernels alone update the parameters."""
        parts = self.plan.parts if self.plan is not None else []
        return not self.fallback and all(path(part.device)[0] == "kernel" for part in parts)

    def expected(self) -> list[tuple[Tensor, str | None]]:
        """Parameters that have no state yet, and why torch will update them, if it will."""
        real = [p for p in self.waiting if not is_lazy(p) and not p.is_meta and p.requires_grad]
        return [(param, why_not_native(param)) for param in real]


def _looks(fallback: list[tuple[Tensor, str]]) -> list[tuple[Any, ...]]:
    """What parameters that are left to torch are, and where: other ones may be left to it then."""
    return [
        (p.dtype, p.device, p.size(), p.stride(), p.data_ptr())
        if is_plain(p) and not p.is_meta
        else (type(p), p.dtype, p.device)
        for p, _ in fallback
    ]
