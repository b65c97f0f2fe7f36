"""What one step works on: param groups, looked at anew where something has changed."""

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, dtype

from tritonopt import slab
from tritonopt.eligible import why_watched
from tritonopt.group import Group, Stale
from tritonopt.state import pack_on_cpu

Work = list[tuple[Group, Sequence[Tensor | None]]]


class Units:
    """Of one optimizer. What is remembered is verified at every step."""

    grad_norm: Tensor | None = None
    may_be_dummy = True  # whether a step may be one that only makes state

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.packed = False  # whether what lies on a CPU has been offered a place in slabs
        self.forget()

    def forget(self) -> None:
        self.groups: dict[tuple[int, int], Group] = {}  # by the first param group, and the end
        self._seen: list[Any] = []  # the param groups and options that they were made of
        self._state: list[Any] = []  # the parameters and entries of the state that they know

    def param_groups(self) -> Sequence[dict[str, Any]]:
        return self.optimizer.param_groups  # type: ignore[no-any-return]

    def look(self, skip: Tensor | None) -> Work | None:
        """The groups, each with the gradients for its plan; None: do nothing. Where state would be
        made, the host reads `skip`, which is not 0 if gradients are infinite."""
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
        optimizer = self.optimizer
        groups = self.param_groups()
        seen = [why_watched(), *groups, *chain.from_iterable(map(dict.values, groups))]
        # Not whether they are equal: a number and a tensor that was rounded are.
        if len(seen) == len(self._seen) and all(map(is_, seen, self._seen)):
            return
        self._seen = []  # until all is done: what raises here must do so again
        for options in groups:
            optimizer._check(options)
        names = {*optimizer.defaults, *optimizer._options, *optimizer._names}
        values = [list(map(group.get, names)) for group in groups]
        fixed = all(_is_fixed(value) for row in values for value in row)
        firsts = [i for i, v in enumerate(values) if not i or not fixed or v != values[i - 1]]
        made = {}
        for place in zip(firsts, [*firsts[1:], len(groups)], strict=False):
            group = Group(optimizer, groups[slice(*place)])
            known = self.groups.get(place)
            made[place] = known.with_options_of(group) if known else group
        self.groups = made
        self._seen = seen if fixed else []  # else they are looked at at every step

    def _look_again(self, stale: Sequence[Group], skip: Tensor | None) -> bool:
        """Looks at groups anew, and makes their missing state; False: do nothing."""
        optimizer, state = self.optimizer, self.optimizer.state
        for group in stale:
            group.sort()
        bare = [param for group in stale for param, _ in group.bare]
        if bare and skip is not None and skip.item():
            return False
        is_dummy = bool(bare) and self.may_be_dummy and optimizer._is_dummy_step(bare)
        for group in stale:
            state.update(group.fitted)
            new = [p for p, is_native in group.bare if is_dummy or is_native]
            group.make_state([p for p in new if not state.get(p)])  # from an earlier group
        if is_dummy:
            return False
        ours = [group for group in stale if not group.why_torch]
        if not self.packed and any(group.native for group in ours):
            keys = chain.from_iterable(group.rule.used for group in ours)
            pack_on_cpu(chain.from_iterable(group.current() for group in ours), state, keys)
            self.packed = True
        for group in stale:
            group.make_plan()
        made = {id(param) for param in bare}  # their values lie on a device, and are known
        for group in stale:
            for param in group.current():
                if param.grad is None or id(param) in made:
                    continue
                if optimizer._is_untrained(state.get(param)):
                    optimizer._start(group.options, state[param])
        return True

    def each_group(self) -> list[Group]:
        """Param groups one by one, for a description."""
        self.forget()  # plans, whose views count as holders of their tensors
        groups = [Group(self.optimizer, [group]) for group in self.optimizer.param_groups]
        for group in groups:
            group.sort(for_a_step=False)
            packable = *group.native, *(p for p, why in group.expected() if why is None)
            group.why_in_place = {id(p): slab.why_not_packed(p) for p in packable}
            group.make_plan()
        return groups


class Part(Units):
    """What a step over some of an optimizer's parameters works on."""

    may_be_dummy = False  # of gradients that are 0, it sees but some

    def __init__(self, optimizer: Any, params: list[Tensor]) -> None:
        super().__init__(optimizer)
        self.params, mine = params, {*map(id, params)}
        rows = ((g, [p for p in g["params"] if id(p) in mine]) for g in optimizer.param_groups)
        self._rows: list[Any] = [(group, {}, some) for group, some in rows if some]

    def param_groups(self) -> list[dict[str, Any]]:
        for group, own, some in self._rows:
            own.clear()
            own.update({**group, "params": some})
        return [own for _, own, _ in self._rows]


def _is_fixed(value: Any) -> bool:
    """Whether a value is what it was; a tensor or an array may have been written to."""
    if type(value) is tuple:
        return all(map(_is_fixed, value))
    return isinstance(value, (int, float, str, type(None), dtype))
