"""What one step works on: param groups in units, each with a plan, looked at anew where it must be.

Neighbouring groups with the same options are one unit: one launch, or one sweep, updates them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonopt.device import is_capturing
from tritonopt.eligible import why_not_native, why_watched
from tritonopt.group import Group, Stale
from tritonopt.shard import local
from tritonopt.state import make_state, pack_on_cpu

Grads = Sequence[Tensor | None]


class Flags(NamedTuple):
    """What options decide about a unit."""

    rule: Any
    why_torch: str | None  # updates all of it
    capturable: bool


class Unit:
    """Param groups `first` to `end`, which have the same options."""

    known: Group | None = None  # how they lay when they were last looked at

    def __init__(self, groups: list[dict[str, Any]], first: int, end: int, flags: Flags) -> None:
        self.groups, self.place = groups[first:end], (first, end)
        self.group = groups[first]  # for its options
        self.flags = flags
        self.hyper: dict[str, Any] = {}

    def params(self) -> list[Tensor]:
        if len(self.groups) == 1:
            return self.group["params"]  # type: ignore[no-any-return]
        return list(chain.from_iterable(group["params"] for group in self.groups))


class Units:
    """Of one optimizer. What is remembered is verified at every step."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.packed = False  # whether what lies on a CPU has been offered a place in slabs
        self.forget()

    def forget(self) -> None:
        self.units: list[Unit] = []
        self._groups: list[Any] = []
        self._values: list[Any] | None = None  # of the options that made the units
        self._keys: list[Any] = []  # of the state that the units know, and its values
        self._entries: list[Any] = []

    def look(self, skip: Tensor | None) -> list[tuple[Unit, Group, Grads]] | None:
        """The units with what is known of them and the gradients of a plan; None: do nothing.

        `skip`: not 0 if gradients are infinite. The host asks where state would be made.
        """
        self._divide()
        state = self.optimizer.state
        same = len(state) == len(self._keys) and all(map(is_, state, self._keys))
        same = same and all(map(is_, state.values(), self._entries))
        work, stale = [], []
        for unit in self.units:
            known = unit.known
            try:
                if known is None or known.provisional:
                    raise Stale
                work.append((unit, known, known.gradients(unit.params(), None if same else state)))
            except Stale:
                stale.append(unit)
        if stale:
            if not self._look_again(stale if self.packed else self.units, skip):
                return None
            groups = [(unit, unit.known) for unit in self.units if unit.known is not None]
            work = [(unit, group, group.gradients(group.params, None)) for unit, group in groups]
        if stale or not same:
            self._keys, self._entries = [*state], [*state.values()]
        return work

    def _divide(self) -> None:
        """Makes the units, if options are not what they were."""
        optimizer, watched = self.optimizer, why_watched()
        groups = optimizer.param_groups
        values = [[watched, *map(group.get, optimizer._names)] for group in groups]
        if values == self._values and all(map(is_, groups, self._groups)):
            return
        for group in groups:
            optimizer._check(group)
        fixed = all(_is_fixed(value) for row in values for value in row)
        flags = [self.flags(group) for group in groups]
        count = len(groups)
        firsts = [
            index for index in range(count)
            if index == 0 or not fixed or flags[index].why_torch
            or values[index] != values[index - 1]
        ]  # fmt: skip
        known = {(unit.place, unit.flags): unit.known for unit in self.units}
        self.units = [
            Unit(groups, first, end, flags[first])
            for first, end in zip(firsts, [*firsts[1:], count], strict=False)
        ]
        for unit in self.units:
            unit.known = known.get((unit.place, unit.flags))
            if not unit.flags.why_torch:
                unit.hyper = optimizer.hyper(unit.group)
        self._groups = list(groups)
        self._values = values if fixed else None  # else they are looked at at every step

    def flags(self, group: dict[str, Any]) -> Flags:
        rule, why_torch = self.optimizer.rule(group), self.optimizer._why_torch(group)
        return Flags(rule, why_torch, bool(group.get("capturable")))

    def _look_again(self, stale: Sequence[Unit], skip: Tensor | None) -> bool:
        """Looks at units anew, once their missing state has been made; False: do nothing."""
        optimizer, state = self.optimizer, self.optimizer.state
        given = [[p for p in unit.params() if p.grad is not None] for unit in stale]
        for unit, params in zip(stale, given, strict=True):
            if any(is_capturing(p.device) for p in unit.params()[:1]):
                raise RuntimeError(
                    "parameters, state or options changed since the last step, or there was none: "
                    "take one step before a graph captures it"
                )
            for param in params:
                self._check_given(unit.flags, param)
        bare = [[p for p in params if not state.get(p)] for params in given]
        if any(bare):
            if skip is not None and skip.item():
                return False
            if optimizer._is_dummy_step(list(chain(*bare))):
                for unit, params in zip(stale, bare, strict=True):
                    self._make(unit, params)
                return False
        for unit, params, new in zip(stale, given, bare, strict=True):
            if not unit.flags.why_torch:
                self._make(unit, [p for p in new if why_not_native(p) is None])
            for param in params:
                if optimizer._is_untrained(state.get(param)):
                    optimizer._start(unit.group, state[param])
            self._check_options(unit, new)
        ours = [unit for unit in self.units if not unit.flags.why_torch]
        if not self.packed and any(given) and ours:
            keys = chain.from_iterable(unit.flags.rule.used for unit in ours)
            pack_on_cpu(chain.from_iterable(unit.params() for unit in ours), state, keys)
            self.packed = True
        for unit in stale:
            unit.known = self.group(unit)
        return True

    def _check_given(self, flags: Flags, param: Tensor) -> None:
        """Raises, before anything is changed, what torch raises of a parameter with a gradient."""
        grad = local(param.grad)
        if grad.layout is not torch.strided:
            kind = "sparse" if grad.is_sparse else grad.layout
            raise RuntimeError(f"{flags.rule.title} does not support {kind} gradients")
        entry = self.optimizer.state.get(param)
        if entry and not flags.why_torch and why_not_native(param) is None:
            for key in ("step", *flags.rule.used):
                if key not in entry:
                    raise KeyError(key)

    def _check_options(self, unit: Unit, new: Sequence[Tensor]) -> None:
        option = self.optimizer._beyond_torch(unit.group)
        for param, why in self.group(unit).fallback if option else ():
            if param.grad is not None:
                for made in new:
                    self.optimizer.state.pop(made, None)
                raise ValueError(
                    f"{option} is not in torch's implementation, which is needed for a parameter "
                    f"of size {tuple(param.size())}: it {why}"
                )

    def _make(self, unit: Unit, params: Sequence[Tensor]) -> None:
        used = unit.flags.rule.used
        starts = {key: self.optimizer.initial(key, unit.group) for key in used}
        on_device = unit.flags.capturable or has_fused_amp(self.optimizer)
        like_gradient = self.optimizer._like_gradient
        make_state(self.optimizer.state, params, starts, like_gradient, on_device)

    def group(self, unit: Unit) -> Group:
        optimizer = self.optimizer
        return Group(
            unit.flags.rule, unit.group, list(unit.params()), optimizer.state,
            unit.flags.why_torch, optimizer._is_untrained, optimizer._sweep,
        )  # fmt: skip

    def each_group(self) -> list[Group]:
        """Param groups one by one, for a description."""
        self.forget()  # plans, whose views would count as holders of their tensors
        groups = self.optimizer.param_groups
        flags = [self.flags(group) for group in groups]
        return [self.group(Unit(groups, i, i + 1, flag)) for i, flag in enumerate(flags)]


def _is_fixed(value: Any) -> bool:
    """Whether a value is what it was; a tensor or an array may have been written to."""
    if type(value) is tuple:
        return all(map(_is_fixed, value))
    return isinstance(value, (int, float, str, type(None)))


def has_fused_amp(optimizer: Any) -> bool:
    return getattr(optimizer, "_step_supports_amp_scaling", False)
