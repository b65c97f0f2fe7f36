"""What one launch or one sweep updates, and what it counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from operator import is_, is_not, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonopt.device import is_capturing, path
from tritonopt.eligible import belongs, same_layout
from tritonopt.scaling import NONE, Scaling
from tritonopt.shard import is_sharded, locals_of, same_shards
from tritonopt.span import all_given, present, spans
from tritonopt.sweep import Sweep
from tritonopt.verify import Guards, Place, addresses


class Rule(NamedTuple):
    """What tells one optimizer from the other."""

    title: str  # the optimizer's name in torch's error texts
    name: str  # of the eager rule, of the launcher and of the op
    eager: Callable[..., None]
    keys: tuple[str, ...]  # of the state a group needs, besides "step"
    all_keys: tuple[str, ...]  # in the order in which the rule takes them
    counts: bool = False  # whether it takes the number of steps, too
    sweep: Callable[..., Sweep] = Sweep


class Stale(Exception):
    """A gradient does not fit the layout: it must be made again."""


class Bucket:
    """Parameters of one group, device and dtype, updated by one launch or one sweep."""

    def __init__(self, rule: Rule, params: list[Tensor], states: list[dict[str, Any]]) -> None:
        self.rule = rule
        self.owners = params
        self.sharded = any(map(is_sharded, params))
        self.params = params = [*locals_of(params, self.sharded)]
        self.states = states
        self.device = params[0].device
        self.dtype = params[0].dtype
        self.keys = ("step", *rule.keys)
        self._found = [[s[key] for s in states] for key in self.keys]
        lists = [locals_of(column, self.sharded) for column in self._found]
        self.columns = dict(zip(self.keys, lists, strict=True))
        self._steps_at = addresses(self.columns["step"])  # without dimensions: no more to look at
        self._place = Place([*self.owners, *chain(*self._found[1:])], self.sharded)
        grads = (p.grad for p in self.owners)
        self.grad_dtype = next((g.dtype for g in grads if g is not None), self.dtype)
        self._expected: Guards | None = None  # of gradients that need no look, one by one
        self._all_given = False  # whether the gradients last asked for are
        self._steps, self._lone_steps = spans([self.columns["step"]], len(params), 1, 1)

        # Other tensors of the same memory: these may leave the state, and be moved.
        memory = {key: [t.detach() for t in self.columns[key]] for key in rule.keys}
        columns = [memory.get(key) for key in rule.all_keys]
        self.update: Callable[..., None]
        if path(self.device)[0] == "eager":
            self.update = rule.sweep(rule.eager, params, columns)
        else:
            from tritonopt.kernels import launch

            self.update = launch.Launch(getattr(launch, rule.name), params, columns)

    def holds(self, same: bool) -> bool:
        """Whether every parameter and state tensor still lies where it lay, and as it lay.

        `same`: the state is known to hold the same tensors.
        """
        if not same and not self._holds_same():
            return False
        return addresses(self.columns["step"]) == self._steps_at and self._place.holds()

    def _holds_same(self) -> bool:
        try:
            for key, known in zip(self.keys, self._found, strict=True):
                if not all(map(is_, map(itemgetter(key), self.states), known)):
                    return False
        except KeyError:
            return False
        return True

    def gradients(self) -> list[Tensor | None] | None:
        """The gradients as the update needs them; None if there are none."""
        grads = [p.grad for p in self.owners]
        if self.sharded:
            both = zip(self.owners, grads, strict=True)
            if not all(grad is None or same_shards(param, grad) for param, grad in both):
                raise Stale
            grads = [*locals_of(grads, True)]
        if self._expected is not None and self._expected.fit(grads):
            self._all_given = self._expected.of_all
            return grads
        self._all_given = all_given(grads)
        if not any(map(is_not, grads, repeat(None))):
            return None
        return self._fitted(grads)

    def _fitted(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        fitted: list[Tensor | None] = []
        for param, grad in zip(self.params, grads, strict=True):
            if grad is not None:
                if grad.layout is not torch.strided:
                    kind = "sparse gradients" if grad.is_sparse else f"{grad.layout} gradients"
                    raise RuntimeError(f"{self.rule.title} does not support {kind}")
                if grad.dtype != self.grad_dtype or not belongs(grad, param):
                    raise Stale
                if not same_layout(grad, param) or grad.is_neg() or grad._is_zerotensor():
                    grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
            fitted.append(grad)
        if all(map(is_, fitted, grads)):
            self._expected = Guards(fitted)
        return fitted

    def count(self, grads: list[Tensor | None], skip: Tensor | None = None) -> None:
        """Adds 1 to the step of every parameter that has a gradient, unless `skip` is not 0."""
        one: Any = 1
        sign = {}
        if skip is not None:  # subtracted, as it leaves `packing.NEVER` what it is: -0.0 - 0.0
            one, sign = 0 - (skip == 0).to(self.columns["step"][0]), {"alpha": -1}
        for span in self._steps:
            flat = span.flats[0]
            assert flat is not None
            if self._all_given:
                flat.add_(one, **sign)
            else:
                for part in present(span, grads):
                    flat[part].add_(one, **sign)
        lone = [self._found[0][i] for i in self._lone_steps if grads[i] is not None]
        if lone and not lone[0].is_cpu and len(set(map(id, lone))) == len(lone):
            torch._foreach_add_(lone, one, **sign)  # else a launch for each
        else:
            for step in lone:
                step.add_(one, **sign)

    def counts(self) -> float | Tensor:
        """The number of steps: of all parameters if it is one and the host knows it, or of each."""
        flat = self._steps[0].flats[0] if len(self._steps) == 1 and not self._lone_steps else None
        return common_count(self.columns["step"] if flat is None else flat)

    def step(
        self, grads: list[Tensor | None], hyper: dict[str, Any], scaling: Scaling = NONE
    ) -> None:
        self.count(grads, scaling.skip)
        if scaling is not NONE:
            hyper["factor"] = scaling.factor
        if scaling.skip is not None:
            hyper["skip"] = scaling.skip
        if self.rule.counts:
            hyper["step"] = self.counts()
        self.update(grads, **hyper)
        changed = self.owners
        if not self._all_given:
            changed = [p for p, g in zip(self.owners, grads, strict=True) if g is not None]
        torch.autograd.graph.increment_version(changed)  # a later backward must notice

    def reserve(self) -> None:
        """What a graph capture of later steps will need, and could not allocate itself."""
        if not isinstance(self.update, Sweep) and not is_capturing(self.device):
            self.update.reserve()  # type: ignore[attr-defined]

    @property
    def bytes_per_element(self) -> int:
        """Read parameter, gradient and state, write parameter and state."""
        states = [column[0].itemsize for key, column in self.columns.items() if key != "step"]
        return 2 * self.dtype.itemsize + self.grad_dtype.itemsize + 2 * sum(states)


def common_count(steps: Sequence[Tensor] | Tensor) -> float | Tensor:
    """The number of steps that all took, if the host knows it and it is one; else that of each."""
    counts = steps if isinstance(steps, Tensor) else torch.stack(list(steps))
    if not counts.is_cpu:
        return counts
    low, high = torch.aminmax(counts)
    return float(low) if low == high else counts
