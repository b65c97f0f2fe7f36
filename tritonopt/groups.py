"""Param groups: their options, their state, and the layouts that are made of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from tritonopt import packing, slab
from tritonopt.bucket import Rule
from tritonopt.device import is_capturing
from tritonopt.eligible import is_plain, same_layout, why_not_native
from tritonopt.layout import IMMUTABLE, Layout
from tritonopt.shard import is_sharded, local, same_shards
from tritonopt.sweep import Sweep

PATHS = ("capturable", "foreach", "differentiable")
"""Options that decide which implementation runs."""


class GroupedOptimizer(torch.optim.Optimizer):
    """What knows of each param group where its tensors lie, and who updates them."""

    _sweep: Callable[..., Sweep] = Sweep
    _layouts: dict[int, Layout]  # by position in param_groups; a cache, verified at every step
    _known: list[list[Any]]  # what the layouts were made of, copied
    _packed = False  # whether anything has been moved into a slab in this step
    _options: dict[str, Any] = {}  # that torch does not have, with the values of torch's rule

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        built = "_layouts" in self.__dict__  # not while the constructor adds the first groups
        if built and isinstance(param_group, dict):
            self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if built:
            self._begin(len(self.param_groups) - 1)

    def _begin_all(self, options: dict[str, Any]) -> None:
        # Groups hold an option only where it is in force: a distributed checkpoint must have every
        # key of a group, and one of torch's optimizer has torch's keys.
        options = {name: v for name, v in options.items() if v != self._options[name]}
        self.defaults.update(options)
        for group in self.param_groups:
            for name, value in options.items():
                group.setdefault(name, value)
            self._check(group)
        self._layouts, self._known = {}, []  # both shared by a copy of `__dict__`
        for index in range(len(self.param_groups)):
            self._begin(index)

    # What a subclass says of its rule.

    def _rule(self, group: dict[str, Any]) -> Rule:
        raise NotImplementedError

    def _initial(self, key: str, group: dict[str, Any]) -> float:
        """The value with which a state tensor begins."""
        return 0.0

    def _is_as_new(self, entry: dict[str, Any], copied: bool = False) -> bool:
        """Whether unused state has the values with which it is made, here or where it is from."""
        return not any(bool(local(tensor).any()) for tensor in entry.values())

    def _deciding(self, group: dict[str, Any]) -> list[Any]:
        """The values that `_check`, `_rule` and `_why_torch` depend on, and `capturable`."""
        raise NotImplementedError

    def _why_torch(self, group: dict[str, Any]) -> str | None:
        """Why a group is left to torch as a whole; None if it is not."""
        if group["differentiable"]:
            return "differentiable=True"
        if group["foreach"] is not None:
            return f"foreach={group['foreach']}"
        return None

    def _check(self, group: dict[str, Any]) -> None:
        """Raises ValueError where an option has a wrong value or does not go with another."""
        for name in ("fused_amp", "max_grad_norm"):
            if name in group:
                raise ValueError(f"{name} concerns all param groups: give it to the constructor")
        option = self._beyond_torch(group)
        why = self._why_torch(group) if option else None
        if why:
            raise ValueError(f"{option} is not in torch's implementation, which {why} selects")

    def _option(self, group: dict[str, Any], name: str) -> Any:
        """The value of an option that torch does not have."""
        return group.get(name, self._options[name])

    def _beyond_torch(self, group: dict[str, Any]) -> str | None:
        """An option in force that torch does not have; None if torch has the group's rule."""
        for name, value in self._options.items():
            if self._option(group, name) != value:
                return f"{name}={self._option(group, name)!r}"
        return None

    # The layout.

    def _current(self, index: int, state: dict[Tensor, Any] | None) -> Layout:
        """The group's layout, made again where it no longer holds."""
        group = self.param_groups[index]
        layout = self._layouts.get(index)
        if layout is None or not self._holds(layout, group, state) or layout.lacks_state():
            if any(is_capturing(p.device) for p in group["params"][:1]):
                raise RuntimeError(
                    "parameters, state or options changed since the last step, or there was none: "
                    "take one step before a graph captures it"
                )
            self._check(group)
            begun = [p for p in group["params"] if p.grad is not None or self.state.get(p)]
            self._make_state(group, begun)
            return self._look(index)
        layout.steps += 1
        # What lies outside a slab is packed once it has stayed in place for a step: some users move
        # parameters or state before every step.
        if layout.steps == 1 and self._pack_moved(group, layout):
            self._packed = True
            layout = self._remake(index)
            layout.steps = 1
        return layout

    def _remake(self, index: int) -> Layout:
        """Makes the layout, and before it the state of parameters that have none at all."""
        group = self.param_groups[index]
        bare = [p for p in group["params"] if p.grad is not None and not self.state.get(p)]
        self._make_state(group, bare)
        return self._look(index)

    def _holds(
        self, layout: Layout, group: dict[str, Any], state: dict[Tensor, Any] | None
    ) -> bool:
        """Whether the options are right and a layout would be made again like this one."""
        options = self._deciding(group)
        if options != layout.options:
            self._check(group)
            if self._flags(group) != layout.flags:
                return False
            known = all(isinstance(option, IMMUTABLE) for option in options)
            layout.options = options if known else None
        return layout.holds(group["params"], state)

    def _flags(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return self._rule(group), self._why_torch(group), group["capturable"]

    def _look(self, index: int) -> Layout:
        """Makes the layout."""
        group = self.param_groups[index]
        rule = self._rule(group)._replace(sweep=self._sweep)
        with torch.inference_mode(False):
            layout = Layout(rule, group, self.state, self._why_torch(group))
        layout.flags = self._flags(group)
        self._layouts[index] = layout
        self._known.clear()
        return layout

    def _check_fallback(self, index: int, layout: Layout) -> None:
        """Raises where torch could not do what the group asks of it."""
        group = self.param_groups[index]
        option = self._beyond_torch(group)
        for param, why in layout.fallback:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                title = self._rule(group).title
                raise RuntimeError(f"{title} does not support sparse gradients")
            if option:
                raise ValueError(
                    f"{option} is not in torch's implementation, which is needed for a parameter "
                    f"of size {tuple(param.size())}: it {why}"
                )

    def _begin(self, index: int) -> None:
        """Packs a new group and makes its state: a checkpoint before the first step has it, too."""
        group = self.param_groups[index]
        params = list(dict.fromkeys(p for p in group["params"] if p.requires_grad))
        if not self._why_torch(group):
            packing.pack(params)
        self._make_state(group, params)
        self._look(index)

    def _make_state(self, group: dict[str, Any], params: Iterable[Tensor]) -> None:
        """State for the parameters that have none yet, unless torch must make it itself."""
        keys = self._rule(group).keys
        self._make(group, [p for p in params if self._is_unmade(p, keys)])

    def _make_again(self, group: dict[str, Any]) -> None:
        """Makes loaded or copied state again that no step has used yet.

        It is ours then. torch would have copied nothing: so no two optimizers may share it, but
        processes may. Neither what the parameter is now nor the options need be those of the copy.
        """
        known = {"step", *self._rule(group).all_keys}
        self._make(group, [p for p in group["params"] if self._is_copy(p, known)])

    def _make(self, group: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Of what torch makes state for at the first step, it is only taken away."""
        for param in params:
            self.state.pop(param, None)
        native = [p for p in params if why_not_native(p) is None and not group["differentiable"]]
        if native:
            on_device = group["capturable"] or has_fused_amp(self)
            starts = {key: self._initial(key, group) for key in self._rule(group).keys}
            packing.make_state(self.state, native, starts, on_device)

    def _is_copy(self, param: Tensor, known: Set[str]) -> bool:
        entry = self.state.get(param, {})
        return (
            entry.keys() <= known
            and packing.is_unused(entry)
            and all(isinstance(v, Tensor) and is_plain(local(v)) for v in entry.values())
            and not any(v.is_cpu and v.is_shared() for v in map(local, entry.values()))
            and self._is_as_new(entry, copied=True)
        )

    def _is_unmade(self, param: Tensor, keys: Sequence[str]) -> bool:
        """Whether a parameter has no state, or one as new that does not fit it any more.

        torch makes state at the first step: until then, momentum may be turned on, and the model
        be moved and cast.
        """
        entry = self.state.get(param)
        if not entry:
            return True
        if not packing.is_unused(entry) or not all(map(_may_be_ours, entry.values())):
            return False
        return not _fits(entry, param, keys) and self._is_as_new(entry)

    @torch._disable_dynamo  # as torch's
    def state_dict(self) -> dict[str, Any]:
        # Of parameters that were taken out of the groups torch has state only if they were trained.
        grouped = {p for group in self.param_groups for p in group["params"]}
        for param in [p for p in self.state if isinstance(p, Tensor) and p not in grouped]:
            if packing.is_unused(self.state[param]):
                del self.state[param]
        return super().state_dict()

    def _pack_moved(self, group: dict[str, Any], layout: Layout) -> bool:
        """Packs what left the slabs; no parameter of an accelerator: graphs may know its place.

        Returns whether the layout must be made again.
        """
        keys: tuple[str, ...] = ("step", *self._rule(group).keys)
        native = [
            p
            for p in layout.params
            if self.state.get(p, {}).keys() >= {*keys} and why_not_native(p) is None
        ]
        if self._why_torch(group) or any(is_capturing(p.device) for p in native[:1]):
            return False
        movable = [p for p in native if p.device.type == "cpu"]
        if len(movable) < len(native) and group["capturable"]:
            keys = ()
        if not packing.any_outside(movable, self.state, native, keys):
            return False
        layout.provisional = True  # whatever is raised here: it has no buckets any more
        layout.buckets.clear()  # which know other tensors of the same memory
        packing.pack(movable)
        packing.pack_state(self.state, native, keys)
        return True


def _fits(entry: dict[str, Any], param: Tensor, keys: Sequence[str]) -> bool:
    """Whether state is of its parameter's kind and layout, as it is made."""
    return all(
        key in entry
        and (entry[key].dtype, entry[key].device) == (param.dtype, param.device)
        and same_shards(entry[key], param)
        and same_layout(local(entry[key]), local(param))
        for key in keys
    )


def _may_be_ours(value: Any) -> bool:
    """Whether state may have been made here, as far as can be told."""
    if not isinstance(value, Tensor):
        return False
    in_slab = value.numel() == 0 or slab.find(value) is not None
    return in_slab or is_sharded(value) or type(value) is not Tensor


def has_fused_amp(optimizer: torch.optim.Optimizer) -> bool:
    return getattr(optimizer, "_step_supports_amp_scaling", False)
