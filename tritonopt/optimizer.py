"""The step that all optimizers share: param groups to slabs, one update for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tritonopt import slab, traced
from tritonopt.describe import table
from tritonopt.device import is_capturing
from tritonopt.layout import Layout, Rule, Stale, is_plain, same_layout, why_not_native
from tritonopt.sweep import Sweep


class SlabOptimizer(torch.optim.Optimizer):
    """Mixed in before one of torch's optimizers: validation, texts and old checkpoints are its."""

    _lists: int  # that torch's `_init_group` fills
    _sweep: Callable[..., Sweep] = Sweep
    _compile_kwargs: dict[str, Any] | None = None
    _layouts: dict[int, Layout]  # by position in param_groups; a cache, verified at every step

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, *args, **kwargs)
        self._layouts = {}
        for index in range(len(self.param_groups)):
            self._begin(index)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if "_layouts" in self.__dict__:  # not while the constructor adds the first groups
            self._begin(len(self.param_groups) - 1)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_layouts", {})
        if self._compile_kwargs is not None:
            self.compile(**self._compile_kwargs)

    # What a subclass says of its rule.

    def _rule(self, group: dict[str, Any]) -> Rule:
        raise NotImplementedError

    def _hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        """The rule's keyword arguments."""
        raise NotImplementedError

    def _torch_update(self, group: dict[str, Any]) -> None:
        """One step of the group by torch's functional implementation."""
        raise NotImplementedError

    def _initial(self, key: str, group: dict[str, Any]) -> float:
        """The value with which a state tensor begins."""
        return 0.0

    def _before_update(self, group: dict[str, Any], layout: Layout) -> None:
        """Called before each update of a group."""

    def _traced_update(
        self, group: dict[str, Any], native: Any, rest: Any, has_complex: bool
    ) -> None:
        """One step of the group in a graph: an op for the native lists, torch for the rest."""
        raise NotImplementedError

    def _why_torch(self, group: dict[str, Any]) -> str | None:
        """Why a group is left to torch as a whole; None if it is not."""
        if group["differentiable"]:
            return "differentiable=True"
        if group["foreach"] is not None:
            return f"foreach={group['foreach']}"
        return None

    # The step.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Performs one optimization step.

        Args:
            closure: reevaluates the model and returns the loss. It runs with gradients enabled; the
                step uses what it leaves in `.grad`.

        Returns:
            What the closure returned; None without one.

        Raises:
            RuntimeError: a gradient is sparse. No parameter and no state has been changed then.
        """
        if torch.compiler.is_compiling():
            return traced.step(self, closure)
        self._accelerator_graph_capture_health_check()
        self._opt_called = True
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            work = [self._examine(index) for index in range(len(self.param_groups))]
            for group, (layout, gradients) in zip(self.param_groups, work, strict=True):
                self._update(group, layout, gradients)
        return loss

    # A scheduler wraps a step without this mark, to set `_opt_called`, in a file that dynamo skips.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def _examine(self, index: int) -> tuple[Layout, list[list[Tensor | None] | None]]:
        """The group's layout as it is now, and the gradients of each of its buckets."""
        layout = self._current(index)
        for param, _ in layout.fallback:
            if param.grad is not None and param.grad.is_sparse:
                title = self._rule(self.param_groups[index]).title
                raise RuntimeError(f"{title} does not support sparse gradients")
        try:
            return layout, [bucket.gradients() for bucket in layout.buckets]
        except Stale:
            layout = self._look(index)
            return layout, [bucket.gradients() for bucket in layout.buckets]

    def _update(
        self, group: dict[str, Any], layout: Layout, gradients: list[list[Tensor | None] | None]
    ) -> None:
        self._before_update(group, layout)
        if layout.fallback:
            params = [param for param, _ in layout.fallback]
            foreach = group["foreach"] or False  # one after the other, as overlapping tensors need
            self._torch_update({**group, "params": params, "foreach": foreach})
        for bucket, grads in zip(layout.buckets, gradients, strict=True):
            if grads is not None:
                with torch.no_grad():
                    bucket.step(grads, self._hyper(group))
                    if group["capturable"]:
                        bucket.reserve()

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
        from tritonopt.compiled import CompiledSweep

        self._compile_kwargs = kwargs
        self._sweep = partial(CompiledSweep, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        if self._compile_kwargs is not None:
            state["_compile_kwargs"] = self._compile_kwargs
        return state

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> bool:
        """Torch's, and, given twice as many lists, what a traced step works on.

        Dynamo does not trace this method: it runs it while it traces, and knows of every tensor in
        the lists where it comes from. What must happen eagerly before a step happens here.
        """
        count = self._lists
        if len(lists) == count:
            return bool(super()._init_group(group, *lists))  # type: ignore[misc]
        self._make_state(group, [p for p in group["params"] if p.grad is not None])
        layout = self._look(next(i for i, g in enumerate(self.param_groups) if g is group))
        self._before_update(group, layout)
        rest = {**group, "params": traced.fill(layout, lists[:count])}
        self._opt_called = True
        return bool(super()._init_group(rest, *lists[count:]))  # type: ignore[misc]

    # The layout.

    def _current(self, index: int) -> Layout:
        """The group's layout, made again where it no longer holds."""
        group = self.param_groups[index]
        layout = self._layouts.get(index)
        holds = layout is not None and layout.holds(group, self.state, self._flags(group))
        if not holds or any(p.grad is not None for p in layout.stateless):  # type: ignore[union-attr]
            if any(is_capturing(p.device) for p in group["params"][:1]):
                raise RuntimeError(
                    "parameters, state or options changed since the last step, or there was none: "
                    "take one step before a graph captures it"
                )
            slabs = self._make_state(group, [p for p in group["params"] if p.grad is not None])
            return self._look(index, slabs)
        assert layout is not None
        layout.steps += 1
        # What lies outside a slab is packed once it has stayed in place for a step: some users move
        # parameters or state before every step.
        slabs = self._pack_moved(group, layout) if layout.steps == 1 else []
        return self._look(index, slabs) if slabs else layout

    def _flags(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return self._rule(group), self._sweep, self._why_torch(group), group["capturable"]

    def _look(self, index: int, new: Sequence[slab.Slab] = ()) -> Layout:
        """Makes the layout, which holds the slabs it finds in use; `new` ones live until then."""
        group = self.param_groups[index]
        flags, why_torch = self._flags(group), self._why_torch(group)
        rule = self._rule(group)._replace(sweep=self._sweep)
        layout = Layout(rule, group, self.state, flags, why_torch)
        self._layouts[index] = layout
        return layout

    def _begin(self, index: int) -> None:
        """Packs a new group and makes its state: a checkpoint before the first step has it, too."""
        group = self.param_groups[index]
        params = list(dict.fromkeys(p for p in group["params"] if p.requires_grad))
        slabs = [] if self._why_torch(group) else _pack(params)
        slabs += self._make_state(group, params)
        self._look(index, slabs)

    def _make_state(self, group: dict[str, Any], params: Iterable[Tensor]) -> list[slab.Slab]:
        """State for the parameters that have none yet, unless they are left to torch."""
        rule = self._rule(group)
        new = [p for p in params if not self.state.get(p) and why_not_native(p) is None]
        if self._why_torch(group):
            return []
        slabs = []
        scalar = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        for batch in _by_slab(new):
            device, dtype = batch[0].device, batch[0].dtype
            home = device if group["capturable"] else torch.device("cpu")
            steps, memory = slab.allocate([_SCALAR] * len(batch), scalar, home, alignment=1)
            columns = {"step": steps}
            slabs.append(memory)
            for key in rule.keys:
                columns[key], memory = slab.allocate(batch, dtype, device)
                memory.memory.fill_(self._initial(key, group))
                slabs.append(memory)
            for number, param in enumerate(batch):
                self.state[param] = {key: column[number] for key, column in columns.items()}
        return slabs

    @torch.no_grad()
    def _pack_moved(self, group: dict[str, Any], layout: Layout) -> list[slab.Slab]:
        """Packs what left the slabs; no parameter of an accelerator: graphs may know its place."""
        native = [p for p in layout.params if self.state.get(p) and why_not_native(p) is None]
        if self._why_torch(group) or any(is_capturing(p.device) for p in native[:1]):
            return []
        slabs = _pack([p for p in native if p.device.type == "cpu"])
        if any(p.device.type != "cpu" for p in native) and group["capturable"]:
            return slabs
        for key in ("step", *self._rule(group).keys):
            moved = [p for p in native if _has_moved(self.state[p][key], p, key)]
            for batch in _by_slab(moved, {p: self.state[p][key] for p in moved}):
                old = [self.state[p][key] for p in batch]
                like, alignment = (old, 1) if key == "step" else (batch, slab.ALIGNMENT)
                new, memory = slab.allocate(like, old[0].dtype, old[0].device, alignment)
                torch._foreach_copy_(new, old)
                slabs.append(memory)
                for param, tensor in zip(batch, new, strict=True):
                    self.state[param][key] = tensor
        return slabs

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
            if layout is None or not layout.holds(group, self.state, self._flags(group)):
                layout = self._look(index)
            layouts.append(layout)
        return table(layouts)


_SCALAR = torch.empty((), device="meta")


def _by_slab(
    params: Iterable[Tensor], states: dict[Tensor, Tensor] | None = None
) -> Iterator[Sequence[Tensor]]:
    """Parameters in batches of which each, or its state, fits a slab of one device and dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in params:
        tensor = states[param] if states else param
        kinds.setdefault((tensor.device, tensor.dtype), []).append(param)
    for (_, dtype), members in kinds.items():
        yield from slab.batches(members, dtype)


@torch.no_grad()
def _pack(params: Iterable[Tensor]) -> list[slab.Slab]:
    """Moves the parameters that may be moved into slabs."""
    movable = [
        p
        for p in params
        if why_not_native(p) is None and slab.why_not_packed(p) is None and slab.find(p) is None
    ]
    slabs = []
    for batch in _by_slab(movable):
        try:
            pieces, memory = slab.allocate(batch, batch[0].dtype, batch[0].device)
        except torch.OutOfMemoryError:
            break
        torch._foreach_copy_(pieces, list(batch))
        for param, piece in zip(batch, pieces, strict=True):
            param.data = piece
        slabs.append(memory)
    return slabs


def _has_moved(tensor: Tensor, param: Tensor, key: str) -> bool:
    """Whether a state tensor does not lie in a slab, in its parameter's layout, and could."""
    if not is_plain(tensor) or tensor.numel() == 0:
        return False
    if slab.find(tensor) is not None and (key == "step" or same_layout(tensor, param)):
        return False
    if tensor.is_cpu and tensor.is_shared():
        return False
    return key == "step" or (tensor.device == param.device and tensor.size() == param.size())
