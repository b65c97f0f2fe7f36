"""Where the tensors of one param group lie and which path updates them: verified at every step."""

from __future__ import annotations

from itertools import compress
from operator import is_
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import _get_capturable_supported_devices

from tritonopt.bucket import Bucket, Rule
from tritonopt.eligible import (
    BAD_GRADIENT,
    is_plain,
    overlapping,
    why_not_native,
    why_not_together,
)
from tritonopt.shard import local

_CAPTURABLE = _get_capturable_supported_devices()

IMMUTABLE = (int, float, str, type(None))
"""Types of options that are what they were. A tensor or an array may have been written to."""


class Layout:
    """One param group as it lay when it was last looked at."""

    def __init__(
        self,
        rule: Rule,
        group: dict[str, Any],
        state: dict[Tensor, Any],
        why_torch: str | None,
    ) -> None:
        self.params: list[Tensor] = list(group["params"])
        self.flags: tuple[Any, ...] = ()  # that decided about it
        self.options: list[Any] | None = None  # that decided about the flags, and are right
        self.states = [state.get(p) for p in self.params]
        lacking = [not s or not s.keys() >= {"step", *rule.keys} for s in self.states]
        self.stateless = list(compress(self.params, lacking))
        self.fallback: list[tuple[Tensor, str]] = []  # left to torch, and why
        self.steps = 0  # taken since

        members: dict[tuple[Any, ...], list[int]] = {}
        keys = ("step", *rule.keys)
        rows = [
            [param, *((state or {}).get(key) for key in keys)]
            for param, state in zip(self.params, self.states, strict=True)
        ]
        shared = overlapping([local(t) for t in row if isinstance(t, Tensor)] for row in rows)
        for index, (param, entry) in enumerate(zip(self.params, self.states, strict=True)):
            why = why_torch or why_not_native(param)
            unmade = param.grad is None or (why is None and not entry)
            if lacking[index] and not why_torch and unmade:
                real = not is_lazy(param) and not param.is_meta and param.requires_grad
                if why is None or not real:
                    continue  # it may be moved before its first gradient comes
            if why is None and group["capturable"] and param.device.type not in _CAPTURABLE:
                why = f"capturable=True is not for {param.device.type}"  # torch raises
            if why is None and index in shared:
                why = "overlaps another parameter, or its state does"
            if why is None and lacking[index]:
                why = "lacks some of its state"  # torch raises
            if why is None:
                assert entry is not None
                if not isinstance(entry["step"], Tensor):
                    why = "has a count of steps that is no tensor"  # torch raises
            if why is None:
                assert entry is not None
                tensors = [entry[key] for key in rule.keys]
                why = why_not_together(param, param.grad, tensors)
            if why is not None:
                self.fallback.append((param, why))
                continue
            grad_dtype = param.dtype if param.grad is None else param.grad.dtype
            key = (param.device, param.dtype, grad_dtype, tensors[0].dtype)
            members.setdefault(key, []).append(index)
        self.buckets = [
            Bucket(rule, [self.params[i] for i in some], [self.states[i] or {} for i in some])
            for some in members.values()
        ]
        self._left = _looks(self.fallback)
        self.provisional = any(why == BAD_GRADIENT for _, why in self.fallback)

    def lacks_state(self) -> bool:
        """Whether a parameter without state has got a gradient."""
        return bool(self.stateless) and any(p.grad is not None for p in self.stateless)

    def holds(self, params: list[Tensor], state: dict[Tensor, Any] | None) -> bool:
        """Whether nothing has been moved, replaced, added or removed.

        `state` None: it and the parameters are known to be the same objects.
        """
        if self.provisional:
            return False
        if state is not None:
            if len(params) != len(self.params) or not all(map(is_, params, self.params)):
                return False
            if not all(map(is_, map(state.get, params), self.states)):
                return False
        for bucket in self.buckets:
            if not bucket.holds(state is None):
                return False
        return not self.fallback or _looks(self.fallback) == self._left


def _looks(fallback: list[tuple[Tensor, str]]) -> list[tuple[Any, ...]]:
    """What parameters that are left to torch are, and where: other ones may be left to it then."""
    return [
        (p.dtype, p.device, p.size(), p.stride(), p.data_ptr())
        if is_plain(p)
        else (type(p), p.dtype, p.device)
        for p, _ in fallback
    ]
