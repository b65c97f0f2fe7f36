"""An optimizer's rule, its options and its param groups."""

from collections.abc import Sequence
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor

from tritonopt import precision, slab
from tritonopt.eager import Scratch, apply
from tritonopt.eligible import is_plain, why_not_native, why_watched
from tritonopt.plan import Rule
from tritonopt.scaling import is_number
from tritonopt.shard import local
from tritonopt.state import make_state, may_move
from tritonopt.units import Units


class RuleOptimizer(torch.optim.Optimizer):
    """The part of :class:`tritonopt.optimizer.FusedOptimizer` that a rule overrides."""

    _units: Units
    _names: tuple[str, ...] = ()  # what a step looks at in a group besides options
    # Options that torch does not have, with the values of torch's rule.
    _options: dict[str, Any] = precision.OPTIONS
    _like_gradient: tuple[str, ...] = ()  # state that torch makes in the gradient's dtype
    _compile_kwargs: dict[str, Any] | None = None
    _in_backward: Any = None  # what takes the steps in backward
    max_grad_norm: float | None = None  # over all groups
    _stock: type[torch.optim.Optimizer] | None = None  # torch's optimizer of this rule

    def rule(self, group: dict[str, Any]) -> Rule:
        """The rule that the options of a param group ask for."""
        raise NotImplementedError

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        """The rule's keyword arguments: numbers, booleans and strings."""
        raise NotImplementedError

    def initial(self, key: str, group: dict[str, Any]) -> float:
        """The value with which a state tensor begins."""
        return 0.0

    def _why_not_native(self, param: Tensor) -> str | None:
        """Why a parameter is left to torch whatever its state and gradient are."""
        return why_not_native(param)

    def update_by_torch(self, group: dict[str, Any]) -> None:
        """A step of `group` by torch's own code, without hooks; else by the eager rule."""
        if self._stock is not None:
            groups, self.param_groups = self.param_groups, [group]
            try:
                unwrap(self._stock.step)(self)
            finally:
                self.param_groups = groups
            return
        rule, hyper = self.rule(group), self.hyper(group)
        starts = {key: self.initial(key, group) for key in rule.used}
        for param in group["params"]:
            if param.grad is None:
                continue
            if not self.state.get(param):
                make_state(self.state, [param], starts, self._like_gradient, False)
            entry = self.state[param]
            entry["step"].add_(1)
            step = {"step": float(entry["step"])} if rule.takes_step else {}
            states = (entry[key] if key in rule.used else None for key in rule.state)
            tensors = [param.detach(), *states]
            apply(rule.eager, param.grad, tensors, Scratch(), {**hyper, **step})

    def _why_torch(self, group: dict[str, Any]) -> str | None:
        """Why a group is left to torch as a whole; None if it is not."""
        if group.get("differentiable"):
            return "differentiable=True"
        if group.get("foreach") is not None:
            return f"foreach={group['foreach']}"
        return why_watched()

    def _check(self, group: dict[str, Any]) -> None:
        """Raises ValueError where an option has a wrong value or does not go with another."""
        for name, value in self._of_all_groups().items():  # ZeRO gives them to both
            if name in group and group[name] != value:
                raise ValueError(f"{name} concerns all param groups: give it to the constructor")
        torchs = {name: v for name, v in self.defaults.items() if type(v) is not bool}
        for name, value in {**(torchs if self._stock else {}), **self._options}.items():
            if is_number(value) and not is_number(group.get(name, value)):
                raise ValueError(f"Invalid {name} value: {group[name]!r}")
        precision.check({**self._options, **group})
        option = self._beyond_torch(group)
        why = self._why_torch(group) if option else None
        if why:
            raise ValueError(f"{option} is not in torch's code, which {why} selects: leave one out")

    def _of_all_groups(self) -> dict[str, Any]:
        """Options that torch does not have and that concern all groups."""
        limit, compiled = self.max_grad_norm, self._compile_kwargs
        compiled = (compiled or True) if compiled is not None else False  # type: ignore[assignment]
        return {"fused_amp": self._has_fused_amp(), "max_grad_norm": limit, "compile": compiled}

    def _option(self, group: dict[str, Any], name: str) -> Any:
        """The value of an option that torch does not have."""
        return group.get(name, self._options[name])

    def _beyond_torch(self, group: dict[str, Any]) -> str:
        """The options in force that torch does not have; empty if torch has the group's rule."""
        values = {name: self._option(group, name) for name in self._options}
        return ", ".join(f"{x}={v!r}" for x, v in values.items() if v != self._options[x])

    def _is_dummy_step(self, bare: Sequence[Tensor]) -> bool:
        """Whether somebody only wants the state made, as `get_optimizer_state_dict` does, by a step
        with an lr of 0 and gradients that are 0. Torch's rules learn from it: Rprop's step sizes
        become the least there is, RMSprop averages weight decay."""
        if any(isinstance(key, Tensor) for key in self.state) or not any(p.numel() for p in bare):
            return False
        if any(float(group.get("lr", 1)) != 0 for group in self.param_groups):
            return False
        grads = [local(p.grad) for p in bare]
        return not any(g.is_meta or not is_plain(g) or bool(g.any()) for g in grads)

    def _has_fused_amp(self) -> bool:
        return getattr(self, "_step_supports_amp_scaling", False) is True

    def _begin(self, options: dict[str, Any], compile: bool | dict[str, Any]) -> None:
        # Groups hold an option only where it is in force: a distributed checkpoint must have every
        # key of a group, and one of torch's optimizer has torch's keys.
        options = {name: v for name, v in options.items() if v != self._options[name]}
        options["capturable"] = False  # torch's check of a capture wants to find it
        for group in (self.defaults, *self.param_groups):
            for name, value in options.items():
                group.setdefault(name, value)
        for group in self.param_groups:
            self._check(group)
        self._units = Units(self)
        self._pack(self.param_groups)
        if compile is not None and not isinstance(compile, (bool, dict)):
            raise TypeError(f"compile is to be True, False or a dict, not {compile!r}")
        if compile is not None and compile is not False:
            self.compile(**({} if compile is True else compile))  # type: ignore[attr-defined]

    def _pack(self, groups: Sequence[dict[str, Any]]) -> None:
        self._units.packed = False  # what lies on a CPU is packed at the next step
        for group in groups:  # now, as a graph that is captured later may know where they lie
            on_accelerator = [param for param in group["params"] if not param.is_cpu]
            if on_accelerator and not self._why_torch(group):
                slab.pack(filter(may_move, on_accelerator))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        built = "_units" in vars(self)  # not while the constructor adds the first groups
        if built and isinstance(param_group, dict):
            self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if built:
            self._check(self.param_groups[-1])
            self._pack(self.param_groups[-1:])
        if self._in_backward is not None:
            self._in_backward.follow()

    def __getstate__(self) -> dict[str, Any]:
        names = {"max_grad_norm", "_compile_kwargs", "_compact"}
        if self._has_fused_amp():
            names.add("_step_supports_amp_scaling")
        kept = names & vars(self).keys()
        return {**super().__getstate__(), **{name: vars(self)[name] for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = vars(self).get("param_groups", [])
        super().__setstate__(state)
        for old, group in zip(before, self.param_groups, strict=False):
            for name in (*self._options, "capturable"):  # which torch's checkpoint may not know
                if name in old:
                    group.setdefault(name, old[name])
        self._units = Units(self)
        if self._has_fused_amp():  # a skipped step is not counted, which only the device knows
            for param, entry in self.state.items():
                if isinstance(param, Tensor) and isinstance(entry.get("step"), Tensor):
                    entry["step"] = entry["step"].to(param.device)

    def _fitted(self, param: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
        """State as the rule takes it, of what somebody has loaded or written."""
        return entry

    def _torchs(self, entry: Any) -> Any:
        """State as a checkpoint has it."""
        return entry

    def _is_untrained(self, entry: Any) -> bool:
        """Whether state was made by a dummy step: `_start` starts it from the options then."""
        return False

    def _loss_value(self, loss: Any) -> float | None:
        """The loss, where the host must know it; raises where it cannot. Called before all else."""
        return None

    def _see_loss(self, value: float) -> None:
        """Called before anything is updated, if the step is not skipped."""
