"""The step that all optimizers share: each param group is one plan, made anew where it must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame
from torch.autograd import _profiler_enabled
from torch.optim.optimizer import (
    _get_scalar_dtype,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from tritonopt import slab
from tritonopt.describe import table
from tritonopt.device import is_capturing, path
from tritonopt.eligible import why_not_native
from tritonopt.group import Group, Stale
from tritonopt.plan import Rule
from tritonopt.scaling import NONE, Scaling, scaled, scaling, total_norm
from tritonopt.shard import is_sharded, local
from tritonopt.span import all_given
from tritonopt.sweep import Sweep

_HAS_ACCELERATOR = torch.accelerator.current_accelerator() is not None
"""Whether this torch is built for one, which a graph may be capturing on."""

_SCALAR = torch.empty((), device="meta")


class Unit:
    """Neighbouring param groups, `first` to `end`, that have the same options."""

    known: Group | None = None  # how they lay when they were last looked at

    def __init__(self, first: int, end: int, flags: tuple[Any, ...], hyper: dict[str, Any]) -> None:
        self.first, self.end = first, end
        self.flags = flags  # rule, why all is left to torch, capturable
        self.hyper = hyper


class FusedOptimizer(torch.optim.Optimizer):
    """Mixed in before one of torch's optimizers: validation, texts and old checkpoints are its."""

    _names: tuple[str, ...]  # of the options that a step looks at
    _options: dict[str, Any] = {}  # that torch does not have, with the values of torch's rule
    _like_gradient: tuple[str, ...] = ()  # state that torch makes in the gradient's dtype
    _sweep: Callable[..., Sweep] = Sweep
    _compile_kwargs: dict[str, Any] | None = None
    _packed = False  # whether what lies on a CPU has been offered a place in slabs
    # Caches, verified at every step: units, the options that they were made of, and keys and values
    # of the state that they know.
    _units: Sequence[Unit] = ()
    _values: list[Any] | None = None
    _known: tuple[list[Any], list[Any]] = ([], [])
    max_grad_norm: float | None = None  # over all groups
    grad_norm: Tensor | None = None  # before clipping, of the last step with max_grad_norm

    def __init__(
        self,
        params: Any,
        *args: Any,
        options: dict[str, Any] | None = None,
        fused_amp: bool = False,
        max_grad_norm: float | None = None,
        **kwargs: Any,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"Invalid max_grad_norm value: {max_grad_norm}")
        if fused_amp:
            self._step_supports_amp_scaling = True  # torch.amp.GradScaler looks for it
        if max_grad_norm is not None:
            self.max_grad_norm = max_grad_norm
        super().__init__(params, *args, **kwargs)
        if fused_amp and self.defaults["differentiable"]:
            raise RuntimeError("`fused_amp` does not support `differentiable`")
        self._begin(options or {})

    def _begin(self, options: dict[str, Any]) -> None:
        # Groups hold an option only where it is in force: a distributed checkpoint must have every
        # key of a group, and one of torch's optimizer has torch's keys.
        options = {name: v for name, v in options.items() if v != self._options[name]}
        self.defaults.update(options)
        for group in self.param_groups:
            for name, value in options.items():
                group.setdefault(name, value)
            self._check(group)
        self._forget()
        self._packed = False
        for group in self.param_groups:
            self._pack_on_accelerator(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        built = "_packed" in vars(self)  # not while the constructor adds the first groups
        if built and isinstance(param_group, dict):
            self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if built:
            self._pack_on_accelerator(self.param_groups[-1])
            self._packed = False

    def _forget(self) -> None:
        self._units, self._values, self._known = (), None, ([], [])

    def __getstate__(self) -> dict[str, Any]:
        names = {"max_grad_norm", "_step_supports_amp_scaling", "_compile_kwargs"}
        kept = names & vars(self).keys()
        return {**super().__getstate__(), **{name: vars(self)[name] for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = vars(self).get("param_groups", [])
        super().__setstate__(state)
        for old, group in zip(before, self.param_groups, strict=False):
            for name in self._options:  # which a checkpoint of torch's optimizer does not know
                if name in old:
                    group.setdefault(name, old[name])
        self._forget()
        self._packed = False
        if has_fused_amp(self):  # a skipped step is not counted, which only the device knows
            for param, entry in self.state.items():
                if isinstance(param, Tensor) and isinstance(entry.get("step"), Tensor):
                    entry["step"] = entry["step"].to(param.device)
        if self._compile_kwargs is not None:
            self.compile(**self._compile_kwargs)

    def _adopt(self) -> None:
        """Takes over after `__class__` was changed from torch's optimizer."""
        self._patch_step_function()  # hooks and profiler names, once per class
        self._begin(self._options)

    # What a subclass says of its rule.

    def rule(self, group: dict[str, Any]) -> Rule:
        raise NotImplementedError

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        """The rule's keyword arguments."""
        raise NotImplementedError

    def initial(self, key: str, group: dict[str, Any]) -> float:
        """The value with which a state tensor begins."""
        return 0.0

    def update_by_torch(self, group: dict[str, Any]) -> None:
        """One step of the group by torch's functional implementation."""
        raise NotImplementedError

    def _why_torch(self, group: dict[str, Any]) -> str | None:
        """Why a group is left to torch as a whole; None if it is not."""
        if group["differentiable"]:
            return "differentiable=True"
        if group["foreach"] is not None:
            return f"foreach={group['foreach']}"
        return _why_watched()

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

    def _is_untrained(self, entry: Any) -> bool:
        """Whether state has been made, but says that it is still to be started from the options."""
        return False

    def _start(self, group: dict[str, Any], entry: Any) -> None:
        """Starts untrained state."""

    def _loss_value(self, loss: Any) -> float | None:
        """The loss as a rule needs it; raises where it has none. Called before anything else."""
        return None

    def _see_loss(self, value: float | None) -> None:
        """Called once per step that is not skipped, before anything is updated."""

    def _needs_host_sync(self) -> bool:
        """Whether the host must know, before anything is updated, that a step is not skipped."""
        return False

    # The step.

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Torch's, which it spares a step that no hook belongs to and no profiler watches."""
        watched = torch.optim.Optimizer.profile_hook_step(func)

        @wraps(func)
        def step(self: FusedOptimizer, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or _profiler_enabled() or _has_step_hooks(self):
                return watched(self, *args, **kwargs)
            return func(self, *args, **kwargs)

        return step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Performs one optimization step.

        Args:
            closure: reevaluates the model and returns the loss. It runs with gradients enabled; the
                step uses what it leaves in `.grad`.

        Returns:
            What the closure returned; None without one.

        Raises:
            RuntimeError: a gradient is sparse. No parameter and no state has been changed then.
            ValueError: an option that torch does not have meets a parameter that is left to torch,
                or the variant needs a loss and there is none. Nothing has been changed, either.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update(loss)
        return loss

    # A scheduler wraps a step without this mark, to set `_opt_called`, in a file that dynamo skips.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def _update(self, loss: Any) -> None:
        """What is left of a step once the gradients are there; dynamo does not trace it."""
        if _HAS_ACCELERATOR:
            self._accelerator_graph_capture_health_check()
        self._opt_called = True
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            value = self._loss_value(loss)
            work = self._look()
            scaling = None if work is None else self._scaling(work)
            if work is not None and scaling is not None:
                self._see_loss(value)
                for unit, known, grads in work:
                    self._update_unit(unit, known, grads, scaling)
        finally:
            torch._C._set_grad_enabled(enabled)

    def _look(self) -> list[tuple[Unit, Group, Sequence[Tensor | None]]] | None:
        """What is known of the groups, and the gradients that a plan needs; None: do nothing."""
        self._divide()
        keys, values = self._known
        state: Any = self.state
        if (
            len(state) == len(keys)
            and all(map(is_, state, keys))
            and all(map(is_, state.values(), values))
        ):
            state = None
        stale, work = [], []
        for unit in self._units:
            try:
                if unit.known is None or unit.known.provisional:
                    raise Stale
                work.append((unit, unit.known, unit.known.gradients(self._params(unit), state)))
            except Stale:
                stale.append(unit)
        if stale and not self._look_again(stale):
            return None
        if stale or state is not None:
            self._known = [*self.state], [*self.state.values()]
        if stale:
            groups = [(unit, unit.known) for unit in self._units if unit.known is not None]
            return [(unit, group, group.gradients(group.params, None)) for unit, group in groups]
        return work

    def _divide(self) -> None:
        """Into units: neighbouring groups with the same options, which one plan updates."""
        watched = _why_watched()
        values = [[watched, *map(group.get, self._names)] for group in self.param_groups]
        if values == self._values:
            return
        count = len(values)
        fixed = all(_is_fixed(value) for row in values for value in row)
        for group in self.param_groups:
            self._check(group)
        alike = [fixed and values[i] == values[i - 1] for i in range(count)]
        ours = [not self._why_torch(group) for group in self.param_groups]
        firsts = [i for i in range(count) if i == 0 or not (alike[i] and ours[i])]
        known = {(unit.first, unit.end, unit.flags): unit.known for unit in self._units}
        self._units = [
            self._unit(first, end)
            for first, end in zip(firsts, [*firsts[1:], count], strict=False)
        ]
        for unit in self._units:
            unit.known = known.get((unit.first, unit.end, unit.flags))
        self._values = values if fixed else None  # else they are looked at at every step

    def _unit(self, first: int, end: int) -> Unit:
        group = self.param_groups[first]
        why_torch = self._why_torch(group)
        flags = self.rule(group), why_torch, group["capturable"]
        return Unit(first, end, flags, {} if why_torch else self.hyper(group))

    def _params(self, unit: Unit) -> list[Tensor]:
        if unit.end == unit.first + 1:
            return self.param_groups[unit.first]["params"]  # type: ignore[no-any-return]
        groups = self.param_groups[unit.first : unit.end]
        return [param for group in groups for param in group["params"]]

    def _look_again(self, stale: Sequence[Unit]) -> bool:
        """Looks at units anew, once their missing state has been made; False: do nothing."""
        if not self._packed:
            stale = self._units
        bare = []  # of each unit, parameters with a first gradient
        for unit in stale:
            params = self._params(unit)
            if any(is_capturing(p.device) for p in params[:1]):
                raise RuntimeError(
                    "parameters, state or options changed since the last step, or there was none: "
                    "take one step before a graph captures it"
                )
            given = [p for p in params if p.grad is not None]
            for param in given:
                layout = local(param.grad).layout
                if layout is not torch.strided:
                    kind = "sparse" if param.grad.is_sparse else str(layout)
                    title = unit.flags[0].title
                    raise RuntimeError(f"{title} does not support {kind} gradients")
                entry = self.state.get(param) if not unit.flags[1] else None
                for key in ("step", *unit.flags[0].used) if entry else ():
                    if key not in entry and why_not_native(param) is None:  # type: ignore[operator]
                        raise KeyError(key)  # as torch does
            bare.append([p for p in given if not self.state.get(p)])
        if any(bare):
            skip = vars(self).get("found_inf") if has_fused_amp(self) else None
            if skip is not None and skip.item():
                return False
            if self._is_dummy_step([p for params in bare for p in params]):
                for unit, params in zip(stale, bare, strict=True):
                    starts = dict.fromkeys(unit.flags[0].used, 0.0)
                    self._make_state(self.param_groups[unit.first], params, starts)
                return False
        for unit, params in zip(stale, bare, strict=True):
            self._complete_state(unit, params)
        if not self._packed and any(p.grad is not None for u in stale for p in self._params(u)):
            self._pack_on_cpu()
            self._packed = True
        for unit in stale:
            unit.known = self._group(unit)
        return True

    def _complete_state(self, unit: Unit, bare: Sequence[Tensor]) -> None:
        group, (rule, why_torch, _) = self.param_groups[unit.first], unit.flags
        if not why_torch:
            starts = {key: self.initial(key, group) for key in rule.used}
            self._make_state(group, [p for p in bare if why_not_native(p) is None], starts)
        for param in self._params(unit):
            if param.grad is not None and self._is_untrained(self.state.get(param)):
                self._start(group, self.state[param])
        option = self._beyond_torch(group)
        for param, why in self._group(unit).fallback if option else ():
            if param.grad is not None:
                for made in bare:
                    self.state.pop(made, None)
                raise ValueError(
                    f"{option} is not in torch's implementation, which is needed for a parameter "
                    f"of size {tuple(param.size())}: it {why}"
                )

    def _group(self, unit: Unit) -> Group:
        rule, why_torch, _ = unit.flags
        params = list(self._params(unit))
        group = self.param_groups[unit.first]
        return Group(rule, group, params, self.state, why_torch, self._is_untrained, self._sweep)

    def _is_dummy_step(self, bare: Sequence[Tensor]) -> bool:
        """Whether somebody only wants the state made, as `get_optimizer_state_dict` does.

        torch's Rprop is ruined by it: step sizes start from 0 and become the least there is.
        """
        return False

    def _make_state(
        self, group: dict[str, Any], params: Sequence[Tensor], starts: dict[str, float]
    ) -> None:
        """State as torch makes it, in slabs."""
        on_device = group["capturable"] or has_fused_amp(self)
        scalar = _get_scalar_dtype()
        kinds: dict[Any, list[Tensor]] = {}
        with torch.inference_mode(False):
            for param in params:
                entry = self.state[param]  # in torch's order
                if _makes_plain(param):
                    kinds.setdefault(param.grad.dtype, []).append(param)  # type: ignore[union-attr]
                    continue
                home = param.device if on_device else torch.device("cpu")
                entry["step"] = torch.zeros((), dtype=scalar, device=home)
                for key, start in starts.items():  # sharded checkpoints need the parameter's type
                    like = param.grad if key in self._like_gradient else param
                    entry[key] = torch.full_like(like, start)  # type: ignore[arg-type]
        for grad_dtype, members in kinds.items():
            for batch in slab.batches(members):
                device, dtype = batch[0].device, batch[0].dtype
                home = device if on_device else torch.device("cpu")
                columns = {
                    "step": slab.allocate([_SCALAR] * len(batch), scalar, home, alignment=1)
                }
                for key, start in starts.items():
                    kind = grad_dtype if key in self._like_gradient else dtype
                    columns[key] = slab.allocate(batch, kind, device, start)
                for number, param in enumerate(batch):
                    self.state[param].update((key, c[number]) for key, c in columns.items())

    def _pack_on_accelerator(self, group: dict[str, Any]) -> None:
        """At once: a graph that is captured later may know the parameters' addresses."""
        if not self._why_torch(group):
            params = dict.fromkeys(group["params"])
            slab.pack(p for p in params if p.device.type != "cpu" and _may_move(p))

    def _pack_on_cpu(self) -> None:
        """At the first step: until then models are moved, cast and wrapped."""
        groups = [group for group in self.param_groups if not self._why_torch(group)]
        params = dict.fromkeys(p for group in groups for p in group["params"])
        movable = [p for p in params if p.is_cpu and _may_move(p)]
        slab.pack(movable)
        entries = [entry for entry in map(self.state.get, movable) if entry]
        for key in dict.fromkeys(key for group in groups for key in self.rule(group).used):
            slab.pack(entry[key] for entry in entries if isinstance(entry.get(key), Tensor))
        steps = [entry["step"] for entry in entries if isinstance(entry.get("step"), Tensor)]
        slab.pack((step for step in steps if step.is_cpu), alignment=1)

    def _scaling(self, work: Sequence[Any]) -> Scaling | None:
        """What the gradients count; None if the step is skipped, as far as the host may know."""
        amp = vars(self) if has_fused_amp(self) else {}
        grad_scale, skip = amp.get("grad_scale"), amp.get("found_inf")
        if grad_scale is None and skip is None and self.max_grad_norm is None:
            return NONE
        norm = None if self.max_grad_norm is None else total_norm([w[1:] for w in work])
        found, self.grad_norm = scaling(norm, self.max_grad_norm, grad_scale, skip)
        waits = self._needs_host_sync() or not all(_in_kernels(known) for _, known, _ in work)
        if skip is not None and waits:
            return None if skip.item() else found._replace(skip=None)
        return found

    def _update_unit(
        self, unit: Unit, known: Group, grads: Sequence[Tensor | None], scaling: Scaling
    ) -> None:
        group = self.param_groups[unit.first]
        if known.fallback:
            params = [param for param, _ in known.fallback]
            foreach = group["foreach"] or False  # one after the other, as overlapping tensors need
            differentiable = self.defaults["differentiable"]
            with torch.set_grad_enabled(differentiable), scaled(params, scaling.factor):
                self.update_by_torch({**group, "params": params, "foreach": foreach})
        if known.plan is None:
            return
        changed = known.written(None if all_given(grads) else grads)
        if changed:
            known.plan(grads, unit.hyper, *scaling, reserve=group["capturable"])
            torch.autograd.graph.increment_version(changed)  # a later backward must notice

    def compile(self, **kwargs: Any) -> None:
        """From now on :meth:`step` runs compiled code: :meth:`torch.nn.Module.compile` for steps.

        What is compiled is the update rule over flat memory: one graph with a handful of inputs for
        any number of parameters, which a scheduler does not change. It concerns parameters on a
        CPU, where it fuses the rule into one loop; on an accelerator a step is one kernel anyway.

        Args:
            kwargs: of :func:`torch.compile`; ``dynamic=True`` unless given.

        Example:
            >>> optimizer = tritonopt.RMSprop(model.parameters())
            >>> optimizer.compile()
            >>> optimizer.step()
        """
        from tritonopt.compile.fused import CompiledSweep

        self._compile_kwargs = kwargs
        self._sweep = partial(CompiledSweep, **kwargs)
        self._forget()

    def describe(self) -> str:
        """A table of what updates which parameters, and why any of them is not packed.

        A line is what one launch, or one sweep on a CPU, updates: parameters of one group, device
        and dtype. *packed* ones lie in a slab, *in place* ones take part from where they are,
        *torch* ones are left to torch's functional implementation. The bytes are the least a step
        can move: parameter, gradient and state read, parameter and state written.

        Example:
            >>> model = torch.nn.Linear(4, 4)
            >>> print(tritonopt.RMSprop(model.parameters()).describe())
            group  device  dtype    path   packed  in place  torch  elements  bytes/step
                0  cpu     float32  eager       2         0      0        20         400
        """
        self._forget()  # plans, whose views would count as holders of their tensors
        groups = [self._group(self._unit(i, i + 1)) for i in range(len(self.param_groups))]
        sweep_path = getattr(self._sweep, "func", self._sweep).path
        return table(groups, sweep_path, self._packed)


def has_fused_amp(optimizer: torch.optim.Optimizer) -> bool:
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def _why_watched() -> str | None:
    """Whether a mode watches operators, which it would not see on the very tensors."""
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode"
    if torch._C._len_torch_function_stack():
        for mode in _get_current_function_mode_stack():
            if not isinstance(mode, DeviceContext):  # `torch.set_default_device` is one
                return "a TorchFunctionMode"
    return None


def _is_fixed(value: Any) -> bool:
    """Whether a value is what it was; a tensor or an array may have been written to."""
    if type(value) is tuple:
        return all(map(_is_fixed, value))
    return isinstance(value, (int, float, str, type(None)))


def _makes_plain(param: Tensor) -> bool:
    """Whether what is made like it is a plain tensor."""
    plain = type(param).__torch_function__ is torch._C._disabled_torch_function_impl
    return (plain or type(param) is Tensor) and not is_sharded(param) and not param.is_complex()


def _may_move(param: Tensor) -> bool:
    return param.requires_grad and why_not_native(param) is None


def _in_kernels(known: Group) -> bool:
    """Whether kernels alone update the group's parameters."""
    parts = known.plan.parts if known.plan is not None else []
    return not known.fallback and all(path(part.device)[0] == "kernel" for part in parts)


def _has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


# What `torch.compiler.disable` does, without the import of dynamo that it takes: in a graph this is
# the reason of a graph break, and of the error under `fullgraph=True`.
FusedOptimizer._update._torchdynamo_disable = True  # type: ignore[attr-defined]
FusedOptimizer._update._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "a step of tritonopt runs as it is, between graphs: it is one launch, which a compiler could "
    "only slow down. Call optimizer.step() outside of what is compiled with fullgraph=True"
)
_SKIP = eval_frame._FrameAction.SKIP
eval_frame.set_code_exec_strategy(
    FusedOptimizer._update.__code__, eval_frame._FrameExecStrategy(_SKIP, _SKIP)
)
