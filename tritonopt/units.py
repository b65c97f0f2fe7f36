"""What one step works on: param groups, looked at anew where something has changed."""

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from tritonopt.device import is_capturing
from tritonopt.eligible import why_not_native, why_watched
from tritonopt.group import Group, Stale
from tritonopt.shard import local
from tritonopt.state import make_state, pack_on_cpu

Work = list[tuple[Group, Sequence[Tensor | None]]]


class Units:
    """Of one optimizer. What is remembered is verified at every step."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.packed = False  # whether what lies on a CPU has been offered a place in slabs
        self.forget()

    def forget(self) -> None:
        self.groups: dict[tuple[int, int], Group] = {}  # by the first param group, and the end
        self._seen: list[Any] = []  # the param groups and options that they were made of
        self._state: list[Any] = []  # the parameters and entries of the state that they know

    def look(self, skip: Tensor | None) -> Work | None:
        """The groups, each with the gradients for its plan; None: do nothing.

        `skip`: not 0 if gradients are infinite. The host asks where state would be made.
        """
        self._divide()
        state = self.optimizer.state
        known = [*state, *state.values()]
        same = len(known) == len(self._state) and all(map(is_, known, self._state))
        work, stale = [], []
        for group in self.groups.values():
            try:
                if group.provisional:
                    raise Stale
                work.append((group, group.gradients(same)))
            except Stale:
                stale.append(group)
        if stale:
            self._state = []  # whatever comes in between, the groups know no state until the end
            if not self._look_again(stale if self.packed else [*self.groups.values()], skip):
                return None
            work = [(group, group.gradients(False)) for group in self.groups.values()]
            known = [*state, *state.values()]
        self._state = known
        return work

    def _divide(self) -> None:
        """Makes the groups, if options are not what they were."""
        optimizer, groups = self.optimizer, self.optimizer.param_groups
        values = [list(map(group.get, optimizer._names)) for group in groups]
        seen = [why_watched(), *groups, *chain.from_iterable(values)]
        # Not whether they are equal: a number and a tensor that was rounded are.
        if len(seen) == len(self._seen) and all(map(is_, seen, self._seen)):
            return
        self._seen = []  # until all is done: what raises here must do so again
        for group in groups:
            optimizer._check(group)
        fixed = all(_is_fixed(value) for row in values for value in row)
        firsts = [
            index for index in range(len(groups))
            if index == 0 or not fixed or values[index] != values[index - 1]
        ]  # fmt: skip
        made = {}
        for place in zip(firsts, [*firsts[1:], len(groups)], strict=False):
            group = Group(optimizer, groups[slice(*place)])
            known = self.groups.get(place)
            made[place] = known.with_options_of(group) if known else group
        self.groups = made
        self._seen = seen if fixed else []  # else they are looked at at every step

    def _look_again(self, stale: Sequence[Group], skip: Tensor | None) -> bool:
        """Looks at groups anew, once their missing state has been made; False: do nothing."""
        optimizer, state = self.optimizer, self.optimizer.state
        given = [[p for p in group.current() if p.grad is not None] for group in stale]
        for group, params in zip(stale, given, strict=True):
            if any(is_capturing(p.device) for p in group.current()[:1]):
                raise RuntimeError(
                    "parameters, state or options changed since the last step, or there was none: "
                    "take one step before a graph captures it"
                )
            for param in params:
                self._check_given(group, param)
        bare = [[p for p in params if not state.get(p)] for params in given]
        made = list(chain(*bare))
        if made and skip is not None and skip.item():
            return False
        is_dummy = bool(made) and optimizer._is_dummy_step(made)
        for group, params in zip(stale, bare, strict=True):
            if not group.why_torch or is_dummy:
                self._make(group, [p for p in params if is_dummy or why_not_native(p) is None])
        if is_dummy:
            return False
        ours = [group for group in self.groups.values() if not group.why_torch]
        if not self.packed and any(given) and ours:
            keys = chain.from_iterable(group.rule.used for group in ours)
            pack_on_cpu(chain.from_iterable(group.current() for group in ours), state, keys)
            self.packed = True
        for group in stale:
            group.look()
            self._check_options(group, made)
        for group, params in zip(stale, given, strict=True):
            for param in params:
                if optimizer._is_untrained(state.get(param)):
                    optimizer._start(group.options, state[param])
        return True

    def _check_given(self, group: Group, param: Tensor) -> None:
        """Raises, before anything is changed, what torch raises of a parameter with a gradient."""
        grad = local(param.grad)
        if grad.layout is not torch.strided:
            kind = "sparse" if grad.is_sparse else grad.layout
            raise RuntimeError(f"{group.rule.title} does not support {kind} gradients")
        entry = self.optimizer.state.get(param)
        if entry and not group.why_torch and why_not_native(param) is None:
            for key in ("step", *group.rule.used):
                if key not in entry:
                    raise KeyError(key)

    def _check_options(self, group: Group, made: Sequence[Tensor]) -> None:
        option = self.optimizer._beyond_torch(group.options)
        for param, why in group.fallback if option else ():
            if param.grad is not None:
                for new in made:
                    self.optimizer.state.pop(new, None)
                raise ValueError(
                    f"{option} is not in torch's implementation, which is needed for a parameter "
                    f"of size {tuple(param.size())}: it {why}"
                )

    def _make(self, group: Group, params: Sequence[Tensor]) -> None:
        optimizer, used = self.optimizer, group.rule.used
        starts = {key: optimizer.initial(key, group.options) for key in used}
        on_device = group.capturable or has_fused_amp(optimizer)
        make_state(optimizer.state, params, starts, optimizer._like_gradient, on_device)

    def each_group(self) -> list[Group]:
        """Param groups one by one, for a description."""
        self.forget()  # plans, whose views would count as holders of their tensors
        groups = [Group(self.optimizer, [group]) for group in self.optimizer.param_groups]
        for group in groups:
            group.look()
        return groups


def _is_fixed(value: Any) -> bool:
    """Whether a value is what it was; a tensor or an array may have been written to."""
    if type(value) is tuple:
        return all(map(_is_fixed, value))
    return isinstance(value, (int, float, str, type(None)))


def has_fused_amp(optimizer: Any) -> bool:
    return getattr(optimizer, "_step_supports_amp_scaling", False)
