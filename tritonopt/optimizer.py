"""The step that all optimizers share: param groups to slabs, one update for each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from tritonopt import traced
from tritonopt.bucket import Stale
from tritonopt.describe import table
from tritonopt.device import path
from tritonopt.groups import GroupedOptimizer, has_fused_amp
from tritonopt.layout import Layout
from tritonopt.scaling import NONE, Scaling, scaled, scaling, total_norm
from tritonopt.shard import is_sharded
from tritonopt.verify import copied, same

_UNTRACED = "need a step that is not traced: call optimizer.compile() and step eagerly"

_HAS_ACCELERATOR = torch.accelerator.current_accelerator() is not None
"""Whether this torch is built for one, which a graph may be capturing on."""


class SlabOptimizer(GroupedOptimizer):
    """Mixed in before one of torch's optimizers: validation, texts and old checkpoints are its."""

    _lists: int  # that torch's `_init_group` fills
    _compile_kwargs: dict[str, Any] | None = None
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
        self._begin_all(options or {})

    def __getstate__(self) -> dict[str, Any]:
        names = {"max_grad_norm", "_step_supports_amp_scaling", "_compile_kwargs"}
        kept = names & vars(self).keys()
        return {**super().__getstate__(), **{name: vars(self)[name] for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_layouts", {}).clear()  # with the state that they knew
        self.__dict__.setdefault("_known", []).clear()
        if has_fused_amp(self):  # a skipped step is not counted, which only the device knows
            for param, entry in self.state.items():
                if isinstance(param, Tensor) and isinstance(entry.get("step"), Tensor):
                    entry["step"] = entry["step"].to(param.device)
        for group in self.param_groups:
            self._make_again(group)
        if self._compile_kwargs is not None:
            self.compile(**self._compile_kwargs)

    def _adopt(self) -> None:
        """Takes over after `__class__` was changed from torch's optimizer."""
        self._patch_step_function()  # hooks and profiler names, once per class
        self._begin_all(self._options)

    # What a subclass says of its rule.

    def _hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        """The rule's keyword arguments."""
        raise NotImplementedError

    def _torch_update(self, group: dict[str, Any]) -> None:
        """One step of the group by torch's functional implementation."""
        raise NotImplementedError

    def _see_loss(self, loss: Any) -> None:
        """Called once per step, before anything is updated, with what the closure returned."""

    def _waits(self) -> bool:
        """Whether the host must know, before anything is updated, that a step is not skipped."""
        return False

    def _settle(self, work: list[Any]) -> bool:
        """Called once per step with the layouts and gradients, in which nothing is wrong.

        Returns whether a layout was made again.
        """
        return False

    def _before_update(self, group: dict[str, Any], layout: Layout) -> None:
        """Called before each update of a group."""

    # The step.

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Torch's, which it spares a step that no hook belongs to and no profiler watches."""
        watched = torch.optim.Optimizer.profile_hook_step(func)

        @wraps(func)
        def step(self: SlabOptimizer, *args: Any, **kwargs: Any) -> Any:
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
        if torch.compiler.is_compiling():
            return traced.step(self, closure)
        if _HAS_ACCELERATOR:
            self._accelerator_graph_capture_health_check()
        self._opt_called = True
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index in range(len(self.param_groups), len(self._layouts)):
            self._layouts.pop(index, None)  # of groups that were removed
        with torch.set_grad_enabled(False):  # as `no_grad`, in half the time
            state = None if same(self._objects(), self._known) else self.state
            work = self._examine_all(state)
            if state is not None:
                self._know()
            if self._settle(work):
                work = self._examine_all(self.state)
            scaling = self._scaling(work)
            if scaling is None:
                return loss
            self._see_loss(loss)
            for group, (layout, gradients) in zip(self.param_groups, work, strict=True):
                self._update(group, layout, gradients, scaling)
        return loss

    # A scheduler wraps a step without this mark, to set `_opt_called`, in a file that dynamo skips.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def _objects(self) -> list[list[Any]]:
        """What layouts are made of: parameters, their entries of state, and the groups' lists."""
        return [[*self.state], [*self.state.values()], [g["params"] for g in self.param_groups]]

    def _know(self) -> None:
        """Notes which objects the layouts, which hold now, were made of."""
        keys, entries, groups = self._objects()
        copies = [
            copied(entry) if isinstance(key, Tensor) else entry
            for key, entry in zip(keys, entries, strict=True)
        ]
        self._known[:] = keys, copies, [[*group] for group in groups]

    def _examine_all(self, state: dict[Tensor, Any] | None) -> list[Any]:
        """Of all groups, again where one of them packed what another one may have, too."""
        indices = range(len(self.param_groups))
        while True:
            self._packed = False
            work = [self._examine(index, state) for index in indices]
            if not self._packed or len(indices) == 1:
                return work
            state = self.state

    def _examine(
        self, index: int, state: dict[Tensor, Any] | None
    ) -> tuple[Layout, list[list[Tensor | None] | None]]:
        """The group's layout as it is now, and the gradients of each of its buckets."""
        layout = self._current(index, state)
        if layout.fallback:
            self._check_fallback(index, layout)
        try:
            return layout, [bucket.gradients() for bucket in layout.buckets]
        except Stale:
            layout = self._remake(index)
            self._check_fallback(index, layout)
            return layout, [bucket.gradients() for bucket in layout.buckets]

    def _scaling(self, work: list[Any]) -> Scaling | None:
        """What the gradients count; None if the step is skipped, as far as the host may know."""
        amp = vars(self) if has_fused_amp(self) else {}
        grad_scale, skip = amp.get("grad_scale"), amp.get("found_inf")
        if grad_scale is None and skip is None and self.max_grad_norm is None:
            return NONE
        norm = None if self.max_grad_norm is None else total_norm(work)
        found, self.grad_norm = scaling(norm, self.max_grad_norm, grad_scale, skip)
        if skip is not None and (self._waits() or not all(map(_in_kernels, work))):
            return None if skip.item() else found._replace(skip=None)
        return found

    def _update(
        self,
        group: dict[str, Any],
        layout: Layout,
        gradients: list[list[Tensor | None] | None],
        scaling: Scaling,
    ) -> None:
        self._before_update(group, layout)
        if layout.fallback:
            params = [param for param, _ in layout.fallback]
            foreach = group["foreach"] or False  # one after the other, as overlapping tensors need
            differentiable = self.defaults["differentiable"]
            with torch.set_grad_enabled(differentiable), scaled(params, scaling.factor):
                self._torch_update({**group, "params": params, "foreach": foreach})
        for bucket, grads in zip(layout.buckets, gradients, strict=True):
            if grads is not None:
                bucket.step(grads, self._hyper(group), scaling)
                if group["capturable"]:
                    bucket.reserve()

    # Compiled steps.

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
        self._layouts.clear()

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> int:
        """Torch's, and, given twice as many lists, what a traced step works on.

        Dynamo does not trace this method: it runs it while it traces, and knows of every tensor in
        the lists where it comes from. What must happen eagerly before a step happens here.
        """
        count = self._lists
        if len(lists) == count:
            return bool(super()._init_group(group, *lists))  # type: ignore[misc]
        self._check(group)
        self._check_traced(group)
        index = next(i for i, g in enumerate(self.param_groups) if g is group)
        self._make_state(group, [p for p in group["params"] if p.grad is not None])
        layout = self._look(index)
        self._check_fallback(index, layout)
        with torch.no_grad():
            self._before_update(group, layout)
        rest = {**group, "params": traced.fill(layout, lists[:count])}
        self._opt_called = True
        if index == 0:  # later, dynamo knows of all tensors, read or not
            given = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
            traced.check_reads(t for p in given for t in (p, *self.state.get(p, {}).values()))
        known = traced.are_known(lists[count - 1])
        has_complex = super()._init_group(rest, *lists[count:])  # type: ignore[misc]
        return traced.HAS_COMPLEX * bool(has_complex) + traced.STEPS_ARE_KNOWN * known

    def _check_traced(self, group: dict[str, Any]) -> None:
        """Raises where a traced graph could not do what the group asks of it."""
        if self.max_grad_norm is not None or getattr(self, "_step_supports_amp_scaling", False):
            raise ValueError(f"max_grad_norm and fused_amp {_UNTRACED}")
        if any(map(is_sharded, group["params"])):
            raise ValueError(f"sharded parameters {_UNTRACED}")

    def _traced_conditions(self, group: dict[str, Any]) -> list[bool]:
        """Whatever about floats decides which op is traced, and whether it may be."""
        raise NotImplementedError

    def _traced_update(
        self, group: dict[str, Any], native: Any, rest: Any, has_complex: bool
    ) -> None:
        """One step of the group in a graph: an op for the native lists, torch for the rest."""
        raise NotImplementedError

    def describe(self) -> str:
        """A table of what updates which parameters, and why any of them is not packed.

        A line is a bucket: what one launch, or one sweep on a CPU, updates: parameters of one
        group, device and dtype. *packed* ones lie in a slab, *in place* ones take part from where
        they are, *torch* ones are left to torch's functional implementation. The bytes are the
        least a step can move: parameter, gradient and state read, parameter and state written.

        Example:
            >>> model = torch.nn.Linear(4, 4)
            >>> print(tritonopt.RMSprop(model.parameters()).describe())
            group  device  dtype    path   packed  in place  torch  elements  bytes/step
                0  cpu     float32  eager       2         0      0        20         400
        """
        layouts = []
        for index, group in enumerate(self.param_groups):
            layout = self._layouts.get(index)
            same = layout is not None and layout.flags == self._flags(group)
            if layout is None or not same or not layout.holds(group["params"], self.state):
                layout = self._look(index)
            layouts.append(layout)
        return table(layouts)


def _in_kernels(work: tuple[Layout, Any]) -> bool:
    """Whether kernels alone update the layout's parameters."""
    layout, _ = work
    return not layout.fallback and all(path(b.device)[0] == "kernel" for b in layout.buckets)


def _has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )
