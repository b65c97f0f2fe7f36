"""Steps taken while the backward pass runs: few gradients are alive at a time."""

import threading
import weakref
from collections import Counter
from contextlib import nullcontext
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import unserializable_hook

from tritonopt.compile import untraced
from tritonopt.optimizer import FusedOptimizer
from tritonopt.shard import local
from tritonopt.state import pack_on_cpu
from tritonopt.surroundings import check_wrappers, is_nested
from tritonopt.units import Part

CPU = torch.device("cpu")
BUCKET_BYTES = 25 * 2**20
TWICE = (
    "parameters were updated by more than one backward pass since the last optimizer.step(), and "
    "step_in_backward sums up no gradients: call step() after each backward, or leave "
    "step_in_backward out and call it after several"
)
TOO_LATE = (
    "step_in_backward goes neither with GradScaler nor with clipping after backward: its steps "
    "have used the gradients as they were, scaled or not, and freed them. Leave these out, or call "
    "optimizer.step() after backward"
)


def step_in_backward(
    model: nn.Module, optimizer: FusedOptimizer, bucket_bytes: int = BUCKET_BYTES
) -> "StepInBackward":
    """From now on each backward pass of `model` also takes the step of `optimizer`.

    As soon as `bucket_bytes` of gradients are there, their parameters are updated and they are
    freed; the rest at the end of the pass. Parameters and state become what :meth:`step` after
    backward makes them, to the last bit. A call of :meth:`step` finds no gradients then, and does
    nothing: training loops, schedulers and closures that call backward stay as they are.

    Every backward is a step: gradients of several are not summed up, which the next call of
    :meth:`step` notices. What reads or changes gradients after backward (`clip_grad_norm_`) finds
    none, which nobody notices. Step hooks run once for each bucket.
    A backward pass that fails has updated some parameters, and frees the gradients that waited.
    What is left of it may not need old values of a parameter whose gradient is complete. Only
    uses without gradient do: after `detach()`, autograd raises its error of a variable "modified by
    an inplace operation"; after `.data`, or in a checkpointed part, nobody notices. Parameters on a
    CPU are packed now, not at the first step. Copies of model and optimizer are not attached.

    Args:
        model: whose backward passes these are: itself, not DDP around it. Parameters of the
            optimizer elsewhere are attached, too, and those that `add_param_group` adds.
        optimizer: one of tritonopt's. Of those wrapped by Lightning or Accelerate, `.optimizer`.
        bucket_bytes: small ones save memory, large ones launches. 0: one step for each parameter.

    Returns:
        A handle whose `remove()` undoes it; as a context manager, it does so at the end.

    Raises:
        TypeError: it is another optimizer, for example torch's.
        ValueError: an option needs all gradients (`max_grad_norm`), scaled ones (`fused_amp`), the
            loss (``variant="irprop+"``) or a graph (`differentiable`); or `bucket_bytes` is
            negative.
        RuntimeError: it is attached already, there are gradients, or DDP or FSDP1 hold parameters.
            In backward: there was a gradient before, `create_graph` is given, another backward pass
            is under way (as in reentrant checkpointing). In :meth:`step`: a parameter has been
            updated more than once since the last one. In `GradScaler.step`: always, too late.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = tritonopt.RMSprop(model.parameters(), lr=0.01)
        >>> handle = tritonopt.step_in_backward(model, optimizer)
        >>> model(torch.randn(8, 10)).square().mean().backward()
        >>> handle.remove()
    """
    if not isinstance(optimizer, FusedOptimizer) or hasattr(optimizer, "optimizer"):
        raise TypeError(
            f"step_in_backward takes RMSprop and Rprop of tritonopt, not {type(optimizer)}: call "
            "tritonopt.from_torch(optimizer) first; if it is a wrapper, give its .optimizer"
        )
    if not bucket_bytes >= 0:
        raise ValueError(f"Invalid bucket_bytes value: {bucket_bytes!r}")
    return StepInBackward(model, optimizer, bucket_bytes)


class Pass:
    """A backward pass. Autograd alone holds it: if the pass fails, the gradients go with it."""

    def __init__(self, handle: "StepInBackward", task: int) -> None:
        self.handle, self.task = handle, task
        self.waiting: dict[Any, list[tuple[Tensor, Tensor]]] = {}  # with gradients, by the stream
        self.sizes: Counter[Any] = Counter()  # bytes
        self.counts: Counter[torch.device] = Counter()  # of buckets
        self.updated: list[int] = []  # ids of parameters

    def __call__(self) -> None:
        self.handle._end(self)

    def __del__(self) -> None:
        for param, grad in chain.from_iterable(self.waiting.values()):
            if param.grad is grad:
                param.grad = None


class TooLate:
    """In the place of the flag that GradScaler, and what clips, ask for."""

    def __bool__(self) -> bool:
        raise RuntimeError(TOO_LATE)


class StepInBackward:
    """What :func:`step_in_backward` returns."""

    def __init__(self, model: nn.Module, optimizer: FusedOptimizer, bucket_bytes: int) -> None:
        self.optimizer, self.bucket_bytes = optimizer, bucket_bytes
        self._lock = threading.RLock()  # each device has a thread of autograd
        self._pass: Any = None  # a weak reference to the one under way
        self._seen: list[Any] = []
        self._parts: dict[Any, Part] = {}  # by device and number of the bucket
        self._hooks: dict[Tensor, list[Any]] = {}
        self._early: set[Tensor] = set()  # had a gradient before
        self._looked = False  # for DDP
        self._updated: set[int] = set()  # ids of parameters, since the user's last step
        self._twice = False  # whether any was updated by two passes since then
        self._check()
        if optimizer._in_backward is not None:
            raise RuntimeError("the optimizer is attached already: call remove() of the handle")
        params = [*chain.from_iterable(g["params"] for g in optimizer.param_groups)]
        if any(param.grad is not None for param in params):
            raise RuntimeError("there are gradients already: call optimizer.zero_grad() first")
        check_wrappers(params, model.modules())
        try:
            self.follow()
        except BaseException:
            self.remove()
            raise
        optimizer._in_backward = self
        optimizer._step_supports_amp_scaling = TooLate()  # type: ignore[assignment]

    def remove(self) -> None:
        for hook in chain.from_iterable(self._hooks.values()):
            hook.remove()
        self._hooks.clear()
        if self.optimizer._in_backward is self:
            del self.optimizer._in_backward, self.optimizer._step_supports_amp_scaling

    def __enter__(self) -> "StepInBackward":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def stepped(self) -> None:
        """Called by each step: one that the user takes is of one backward pass."""
        if isinstance(self.optimizer._units, Part):
            return
        twice, self._twice = self._twice, False
        self._updated.clear()
        if twice:
            raise RuntimeError(TWICE)

    def follow(self) -> None:
        """Attaches the parameters that the optimizer has now; plans anew if anything is other."""
        optimizer = self.optimizer
        groups = optimizer.param_groups
        params = [*chain.from_iterable(group["params"] for group in groups)]
        seen = [x for group in groups for x in (group, *group["params"])]
        seen.append(optimizer._sweep)
        if _same(seen, self._seen):
            return
        self._parts.clear()
        for param in self._hooks.keys() - {*params}:
            for hook in self._hooks.pop(param):
                hook.remove()
        for param in params:
            if param in self._hooks or not (param.is_floating_point() or param.is_complex()):
                continue
            frozen = not param.requires_grad  # it takes no hook then, but may be trained later
            param.requires_grad_(True)
            self._hooks[param] = self._hook(param)
            param.requires_grad_(not frozen)
        self._seen = seen
        ours = (group["params"] for group in groups if not optimizer._why_torch(group))
        # Now, as what autograd has saved in a forward pass may not be moved.
        pack_on_cpu(chain.from_iterable(ours), optimizer.state, ())

    def _hook(self, param: Tensor) -> list[Any]:
        """Of the two, Python's collector sees only what the first one holds: it holds this."""
        ref = weakref.ref(self)

        @unserializable_hook
        def before(_: Tensor) -> None:  # in `torch.autograd.grad`, too
            if param.grad is not None:
                self._early.add(param)
            elif self._early:
                self._early.discard(param)

        def after(param: Tensor) -> None:
            if (handle := ref()) is not None:
                handle._after(param)

        return [param.register_hook(before), param.register_post_accumulate_grad_hook(after)]

    def _check(self) -> None:
        optimizer = self.optimizer
        why = None
        if optimizer.max_grad_norm is not None:
            why = "max_grad_norm needs all gradients at once"
        if optimizer._has_fused_amp():
            why = "fused_amp is for GradScaler, which steps after backward"
        for group in optimizer.param_groups:
            if group.get("variant") == "irprop+":
                why = "variant='irprop+' needs the loss"
            if group.get("differentiable"):
                why = "differentiable=True needs a graph of the gradients"
        if why:
            raise ValueError(f"{why}: leave it out, or call step() after backward")

    @untraced("step_in_backward takes its steps outside of what compiled autograd compiles")
    def _after(self, param: Tensor) -> None:
        """Once its gradient is complete."""
        grad = param.grad
        if grad is None:
            return
        with self._lock:
            if self._early and param in self._early:
                raise RuntimeError(
                    "a parameter had a gradient before this backward pass, and step_in_backward "
                    "sums up none: call optimizer.zero_grad(), or step() after several backwards"
                )
            try:
                self._wait(param, grad)
            except BaseException:
                param.grad = None  # or the next pass would find it
                raise

    def _wait(self, param: Tensor, grad: Tensor) -> None:
        if grad.requires_grad:
            raise RuntimeError("step_in_backward cannot be used with create_graph=True")
        now = self._begun()
        if param not in self._hooks:  # it has left the optimizer since
            return
        stream = CPU if param.is_cpu else _stream(param.device)
        now.waiting.setdefault(stream, []).append((param, grad))
        numel = (grad if type(grad) is Tensor else local(grad)).numel()
        now.sizes[stream] += numel * grad.itemsize
        if now.sizes[stream] >= self.bucket_bytes:
            self._step(now, stream)

    def _begun(self) -> Pass:
        now, task = self._pass and self._pass(), torch._C._current_graph_task_id()
        if now is not None and now.task == task:
            return now  # type: ignore[no-any-return]
        if now is not None or is_nested():
            raise RuntimeError(
                "step_in_backward cannot be used with one backward pass inside or beside another: "
                "give use_reentrant=False to checkpoint()"
            )
        self._check()
        self.follow()
        if not self._looked:  # again, as a model is often wrapped once its optimizer is there
            check_wrappers(self._hooks)
            self._looked = True
        now = Pass(self, task)
        self._pass = weakref.ref(now)
        torch.autograd.Variable._execution_engine.queue_callback(now)  # type: ignore[attr-defined]
        return now

    def _step(self, now: Pass, stream: Any) -> None:
        optimizer, params = self.optimizer, [param for param, _ in now.waiting[stream]]
        device = params[0].device
        place = device, now.counts[device]
        part = self._parts.get(place)
        if part is None or not _same(params, part.params):
            part = self._parts[place] = Part(optimizer, params)
        whole, optimizer._units = optimizer._units, part
        try:
            optimizer.step()
        finally:
            optimizer._units = whole
        for param in params:
            param.grad = None
        now.updated += map(id, params)
        now.waiting[stream], now.sizes[stream] = [], 0
        now.counts[device] += 1

    def _end(self, now: Pass) -> None:
        with self._lock:
            for stream, params in now.waiting.items():
                on_stream = isinstance(stream, torch.Stream)
                with stream if on_stream else nullcontext():
                    if params:
                        self._step(now, stream)
                if on_stream:  # autograd has waited for it before this
                    torch.accelerator.current_stream(stream.device).wait_stream(stream)
            self._pass = None
            self._twice |= not self._updated.isdisjoint(now.updated)
            self._updated.update(now.updated)


def _stream(device: torch.device) -> Any:
    """What orders the work on a device: its current stream, if it has streams."""
    return torch.accelerator.current_stream(device) if device.type in ("cuda", "xpu") else device


def _same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(map(is_, left, right))
