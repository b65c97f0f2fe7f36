"""The step that all optimizers share, and how to write another one.

A rule that updates every element by itself becomes an optimizer in three parts. Launches, slabs,
checkpoints, missing gradients, moved parameters, clipping, `compile()` and `describe()` come along.

1. **The rule in plain torch.** It gets flat tensors of one dtype (fp32, or fp64 for fp64
   parameters): parameter, gradient, the state in the rule's order, and
   :class:`~tritonopt.eager.Scratch`. It writes the parameter and the state in place, never the
   gradient. It defines correctness, runs on a CPU, and is what `compile()` compiles: there, numbers
   are 0-dim tensors, and `scratch` is empty.

       def sign_(param, grad, momentum_buffer, scratch, *, lr, momentum):
           momentum_buffer.mul_(momentum).add_(grad)
           param.sub_(torch.sign(momentum_buffer) * lr)

2. **The rule on the device**, for GPUs and the interpreter, its kernel, and what launches that:
   read `kernels/rprop.py`, and `rprop_` in `kernels/launch.py`. `update` reads and writes; the rule
   gets values, and returns the parameter's and the state's new ones. Every kernel begins with the
   same five pointers and ends with the same two constants.

       @triton.jit
       def sign_rule(param, grad, momentum_buffer, lr, momentum):
           dtype: tl.constexpr = param.dtype
           momentum_buffer = momentum_buffer * tl.cast(momentum, dtype) + grad
           sign = (momentum_buffer > 0).to(dtype) - (momentum_buffer < 0).to(dtype)
           return param - sign * tl.cast(lr, dtype), momentum_buffer

       @triton.jit
       def sign_kernel(
           table_ptr, programs_ptr, factor_ptr, skip_ptr, noise_ptr, lr: "fp64", momentum: "fp64",
           TYPES: tl.constexpr, BLOCK: tl.constexpr,
       ):
           update(table_ptr, programs_ptr, factor_ptr, skip_ptr, noise_ptr,
                  sign_rule, (lr, momentum), TYPES, BLOCK)

       def launch_sign_(launch, *, lr, momentum):
           launch.run(sign_kernel, (lr, momentum))

3. **The class.**

       class Sign(FusedOptimizer):
           def __init__(self, params, lr=1e-3, momentum=0.9, **options):  # master, max_grad_norm
               super().__init__(params, {"lr": lr, "momentum": momentum}, **options)

           def rule(self, group):
               keys = ("momentum_buffer",)
               return Rule("Sign", sign_, lambda: launch_sign_, state=keys, used=keys)

           def hyper(self, group):
               return {"lr": group["lr"], "momentum": group["momentum"]}

`Rule`, `Scratch`, `update` of `tritonopt.kernels.update`, and this class with `rule`, `hyper`,
`initial` and `update_by_torch` are stable. Parameters that no launch takes (complex, not dense,
overlapping, subclasses) are updated one by one, in their own shape, by the eager rule, unless
`update_by_torch` says how. With `takes_step` of `Rule` the rule takes `step`, too. With
`takes_mean` it takes `mean`, of a mask over each whole parameter: read `_masked` in `eager.py`, and
`rmsprop_` in `kernels/launch.py`.
"""

import warnings
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from tritonopt.compile import untraced
from tritonopt.describe import in_force, table
from tritonopt.plan import Rule
from tritonopt.precision import restore
from tritonopt.rule import RuleOptimizer
from tritonopt.scaling import checked_limit, clipped, total_norm
from tritonopt.sweep import Sweep

__all__ = ["FusedOptimizer", "Rule"]


class FusedOptimizer(RuleOptimizer):
    """A base of optimizers whose rule updates every element by itself: see the module's docstring.
    Validation, texts and old checkpoints are those of a torch optimizer that it is mixed in before.
    """

    _sweep: Callable[..., Sweep] = Sweep

    def __init__(
        self, params: Any, *args: Any, options: dict[str, Any] | None = None,
        fused_amp: bool = False, max_grad_norm: float | None = None,
        compile: bool | dict[str, Any] = False, state_dtype: torch.dtype | None = None,
        master: str | None = None, stochastic_rounding: bool = False, rounding_seed: int = 0,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        if fused_amp:
            self._step_supports_amp_scaling = True  # torch.amp.GradScaler looks for it
        if max_grad_norm is not None:
            self.max_grad_norm = checked_limit(max_grad_norm)
        if compile is True or isinstance(compile, dict):
            self._compile_kwargs = {} if compile is True else compile
        super().__init__(params, *args, **kwargs)
        if fused_amp and self.defaults.get("differentiable", False):
            raise RuntimeError("`fused_amp` does not support `differentiable`")
        of_precision = dict(
            state_dtype=state_dtype, master=master,
            stochastic_rounding=stochastic_rounding, rounding_seed=rounding_seed,
        )  # fmt: skip
        self._begin({**(options or {}), **of_precision}, compile)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._compile_kwargs is not None:
            self.compile(**self._compile_kwargs)

    def state_dict(self) -> dict[str, Any]:
        """Torch's, in the form in which torch has the state."""

        def convert(optimizer: Any, saved: dict[str, Any]) -> None:
            saved["state"] = {key: self._torchs(entry) for key, entry in saved["state"].items()}

        handle = self.register_state_dict_post_hook(convert, prepend=True)  # before the user's
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        given: list[dict[str, Any]] = []
        before = self.register_load_state_dict_pre_hook(lambda _, saved: given.append(saved))
        after = self.register_load_state_dict_post_hook(
            lambda _: restore(self, given[0]), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm before clipping, of the last step with `max_grad_norm`."""
        return self._units.grad_norm

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Torch's, which it spares a step that no hook belongs to and no profiler watches."""
        watched = torch.optim.Optimizer.profile_hook_step(func)

        @wraps(func)
        def step(self: FusedOptimizer, *args: Any, **kwargs: Any) -> Any:
            hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
            hooks = hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks
            if torch.compiler.is_compiling() or _profiler_enabled() or hooks:
                return watched(self, *args, **kwargs)
            return func(self, *args, **kwargs)

        return step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Performs one optimization step.

        In a compiled function dynamo breaks the graph here, as around torch's own step. A CUDA
        graph can capture it, with ``capturable=True`` and a tensor ``lr`` on the device, once a
        step has been taken outside of the capture.

        Args:
            closure: reevaluates the model and returns the loss, which is returned. It runs with
                gradients enabled; the step uses what it leaves in `.grad`.

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

    @untraced(
        "a step of tritonopt is in no graph: call it outside of what fullgraph=True compiles. "
        "optimizer.compile() compiles the step; torch.ops.tritonopt has operators for graphs"
    )
    def _update(self, loss: Any) -> None:
        """What is left of a step once the gradients are there; dynamo does not trace it."""
        if self._in_backward is not None:
            self._in_backward.stepped()
        if torch.cuda.is_initialized() or torch.xpu.is_initialized():  # else nothing is captured
            self._accelerator_graph_capture_health_check()
        self._opt_called = True
        amp = vars(self) if self._has_fused_amp() else {}
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            value, limit = self._loss_value(loss), checked_limit(self.max_grad_norm)
            grad_scale, skip = amp.get("grad_scale"), amp.get("found_inf")
            work = self._units.look(skip)
            if work is None:
                return
            factor = None
            if grad_scale is not None:  # rounded as torch.amp.GradScaler does
                factor = grad_scale.double().reciprocal().float()
            if limit is not None:
                self._units.grad_norm, factor = clipped(total_norm(work), limit, factor)
            if skip is not None and (
                value is not None or not all(group.in_kernels() for group, _ in work)
            ):
                if skip.item():  # the host must know
                    return
                skip = None
            if value is not None:
                self._see_loss(value)
            for group, grads in work:
                group.update(grads, factor, skip)
        finally:
            torch._C._set_grad_enabled(enabled)

    def compile(self, **kwargs: Any) -> None:
        """From now on :meth:`step` runs compiled code: :meth:`torch.nn.Module.compile` for steps.

        On a CPU the rule becomes one fused loop over flat memory: one graph for any number of
        parameters, and one of large ones. Numbers that change compile nothing anew, but a momentum
        that becomes 0. On an accelerator a step is one kernel anyway. Results equal eager ones up
        to rounding. It survives checkpoints, copies, pickling and moved parameters, and does not
        count against dynamo's recompilation limit. Where a CPU lacks a C++ compiler, it only warns.

        Args:
            kwargs: of :func:`torch.compile`; ``dynamic=True`` unless given. Loops over 2^15
                elements and more use torch's threads, or what ``options={"cpp.threads": n}`` says.

        Example:
            >>> optimizer = tritonopt.RMSprop(model.parameters())
            >>> optimizer.compile()
            >>> optimizer.step()
        """
        from tritonopt.compile.fused import CompiledSweep, has_compiler

        torch.compile(lambda: None, **kwargs)  # raises where an option is wrong
        self._compile_kwargs = kwargs
        whys = [RuleOptimizer._why_torch(self, group) for group in self.param_groups]
        if whys and all(whys):
            warnings.warn(f"not compiled: {whys[0]} leaves the step to torch", stacklevel=2)
        on_cpu = any(param.is_cpu for group in self.param_groups for param in group["params"])
        if on_cpu and not has_compiler(kwargs.get("backend", "inductor")):
            warnings.warn("steps are eager: install a C++ compiler or name it in CXX", stacklevel=2)
            return
        self._sweep = partial(CompiledSweep, **kwargs)
        self._units.forget()

    def describe(self) -> str:
        """A table of what updates which parameters, and why any of them is not packed.

        *packed* ones lie in a slab, or are offered a place at the first step; *in place* ones take
        part from where they are; *torch* ones are left to torch's own code. The bytes are the least
        a step can move: parameter, gradient and state read, parameter and state written.

        Example:
            >>> model = torch.nn.Linear(4, 4)
            >>> print(tritonopt.RMSprop(model.parameters()).describe())
            group  device  dtype    path   packed  in place  torch  elements  bytes/step
                0  cpu     float32  eager       2         0      0        20         400
        """
        return table(self._units)

    def __repr__(self) -> str:
        options = "".join(f"    {name}: {value}\n" for name, value in in_force(self._units).items())
        title = "All groups\n" if options else ""
        return super().__repr__().removesuffix(")") + title + options + ")"
