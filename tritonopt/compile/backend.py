"""The backend `tritonopt` of torch.compile: stock RMSprop and Rprop as one op, the rest as ever.

    >>> optimizer = torch.optim.RMSprop(model.parameters())
    >>> step = torch.compile(optimizer.step, backend="tritonopt")

Compiling a stock optimizer costs Inductor a kernel's worth of work per parameter. For this backend
dynamo does not look into torch's functional `rmsprop` and `rprop`: each call becomes one
`tritonopt::rmsprop_` or `rprop_`. What the op does not take is traced as ever, and so is everything
for other backends. The graph goes to Inductor, unless it has nothing but these ops.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.eval_frame import innermost_backend
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import TracingContext
from torch.fx import GraphModule, Node
from torch.optim.rmsprop import rmsprop
from torch.optim.rprop import rprop
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tritonopt import ops as ops
from tritonopt.compile.inductor import check, inductor
from tritonopt.device import path

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_listeners: list[list[Report]] = []
_left: weakref.WeakKeyDictionary[TracingContext, list[str]] = weakref.WeakKeyDictionary()


def tritonopt(
    module: GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compiles a graph of dynamo. `mode` and `options` are Inductor's, for what is left to it.

    Not called by users, but by `torch.compile(fn, backend="tritonopt", mode=..., options=...)`.
    """
    check(mode, options)
    report = Report.of(module)
    for reports in _listeners:
        reports.append(report)
    if report.replaced and _is_update_only(module):
        return _Calls(module)
    return inductor(module, inputs, mode=mode, options=options)


# While dynamo traces.


@torch.compiler.assume_constant_result
def _is_wanted() -> bool:
    """Whether the graph that is being traced is for this backend."""
    output: Any = InstructionTranslator.current_tx().output
    backend: Any = innermost_backend(output.compiler_fn)
    return getattr(backend, "compiler_fn", backend) is tritonopt


@torch.compiler.assume_constant_result
def _takes(name: str) -> bool:
    """Whether the op takes the `lists` of the function that is being traced.

    What it looks at, dynamo guards, as the tensors are inputs of the graph. Tracing the checks
    would take twice as long as everything else.
    """
    output: Any = InstructionTranslator.current_tx().output
    columns = output.current_tx.symbolic_locals["lists"].realize().items
    lists = [[_fake(x.realize()) for x in column.realize().items] for column in columns]
    why = _why_not(lists)
    if why:
        _left.setdefault(output.tracing_context, []).append(f"{name}, as {why}")
    return not why


def _fake(variable: Any) -> Any:
    """The fake tensor that dynamo has of a tensor; None of anything else."""
    return variable.as_proxy().node.meta["example_value"] if variable.is_tensor() else None


def _why_not(lists: Sequence[Sequence[Any]]) -> str:
    params, _, *states, steps = lists
    if not params:
        return "there is no gradient"
    tensors = [tensor for column in lists for tensor in column]
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return "a step is a number"
    if any(is_traceable_wrapper_subclass(tensor) for tensor in tensors):
        return "a tensor is of a subclass"
    if any(tensor.layout is not torch.strided for tensor in tensors):
        return "a tensor is sparse"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "autograd differentiates it"
    dtype, device = params[0].dtype, params[0].device
    if dtype not in DTYPES:
        return f"it is of {dtype}"
    if path(device)[0] is None:
        return path(device)[1]
    for column in lists[:-1]:
        for tensor, param in zip(column, params, strict=False):
            if tensor.dtype != dtype or tensor.device != device:
                return "it mixes dtypes or devices"
            if tensor.size() != param.size():
                return "a gradient or state has not its parameter's shape"
    written = [t.untyped_storage()._cdata for column in (params, *states, steps) for t in column]
    if len(set(written)) < len(written):
        return "it writes to a memory twice"
    if not {grad.untyped_storage()._cdata for grad in lists[1]}.isdisjoint(written):
        return "a gradient is a parameter's memory, or its state's"
    return ""


def _substitute(function: Any, count: int, update: Callable[..., None]) -> None:
    """From now on dynamo traces `update` where the stock optimizer calls `function`.

    `count`: of lists that it takes.
    """
    inlined = FunctionType(
        function.__code__, function.__globals__, function.__name__, None, function.__closure__
    )
    name, names = function.__name__, [*inspect.signature(function).parameters][count:]

    @torch.compiler.substitute_in_graph(function, skip_signature_check=True)
    def traced(*args: Any, **options: Any) -> None:
        if not _is_wanted() or len(args) < count:
            inlined(*args, **options)
            return
        lists = args[:count]
        if _takes(name):
            update(lists, {**dict(zip(names, args[count:], strict=False)), **options})
        else:
            inlined(*args, **options)


def _rmsprop(lists: Any, options: dict[str, Any]) -> None:
    params, grads, square_avgs, grad_avgs, buffers, steps = lists
    hyper = {name: options[name] for name in ("lr", "alpha", "eps", "weight_decay", "momentum")}
    is_tensor = isinstance(options["lr"], Tensor)
    packet = torch.ops.tritonopt.rmsprop_
    op = packet.tensor_lr if is_tensor else packet.default
    op(
        params, grads, square_avgs, grad_avgs if options["centered"] else [],
        buffers if options["momentum"] > 0 else [], steps,
        maximize=options.get("maximize", False), **hyper,
    )  # fmt: skip


def _rprop(lists: Any, options: dict[str, Any]) -> None:
    names = ("etaminus", "etaplus", "step_size_min", "step_size_max")
    hyper = {name: options[name] for name in names}
    torch.ops.tritonopt.rprop_.default(*lists, maximize=options.get("maximize", False), **hyper)


_substitute(rmsprop, 6, _rmsprop)
_substitute(rprop, 5, _rprop)


# What became of it.


def _is_op(node: Node) -> bool:
    return getattr(node.target, "namespace", "") == "tritonopt"


@dataclass
class Report:
    """What became of one graph."""

    replaced: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    nodes: int = 0

    @classmethod
    def of(cls, module: GraphModule) -> Report:
        context = TracingContext.try_get()
        left = [] if context is None else _left.get(context, [])
        report = cls(left=left, nodes=len(module.graph.nodes))
        for node in filter(_is_op, module.graph.nodes):
            title = {"rmsprop_": "RMSprop", "rprop_": "Rprop"}[node.target._opname]  # type: ignore[union-attr]
            options = ", ".join(f"{name}={value}" for name, value in node.kwargs.items())
            report.replaced.append(f"{title} of {len(node.args[0])} parameters ({options})")  # type: ignore[arg-type]
        return report

    def __str__(self) -> str:
        lines = [f"replaced: {what}" for what in self.replaced]
        lines += [f"left to Inductor: {what}" for what in self.left]
        return "\n".join(lines or ["left to Inductor: no step of a stock RMSprop or Rprop"])


class Explanation(list[Report]):
    """One report per graph that was compiled."""

    def __str__(self) -> str:
        if not self:
            return "no graph was compiled: nothing had to be computed (are there gradients?)"
        return "\n".join(
            f"graph {index}, {report.nodes} nodes\n  " + str(report).replace("\n", "\n  ")
            for index, report in enumerate(self)
        )


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Compiles a function with the backend, calls it once, and says what became of each graph.

    Args:
        fn: what is to be compiled. It runs: the optimizer takes a step.
        args, kwargs: the function's arguments.

    Example:
        >>> print(tritonopt.backend.explain(optimizer.step))
        graph 0, 10 nodes
          replaced: RMSprop of 2 parameters (maximize=False, lr=0.01, alpha=0.99, eps=1e-08, ...)
    """
    torch._dynamo.reset()
    reports = Explanation()
    _listeners.append(reports)
    try:
        torch.compile(fn, backend=tritonopt)(*args, **kwargs)
    finally:
        _listeners.remove(reports)
        torch._dynamo.reset()
    return reports


# A graph with nothing but ops: there is nothing to compile, and few Python lines to run.


def _is_number(node: Node) -> bool:
    """Whether the node gets a number that changes out of the tensor that dynamo made of it."""
    return node.op == "call_method" and node.target == "item"


def _is_update_only(module: GraphModule) -> bool:
    *nodes, output = module.graph.nodes
    return not output.all_input_nodes and all(
        node.op in ("placeholder", "get_attr") or _is_number(node) or _is_op(node) for node in nodes
    )


class _Calls:
    def __init__(self, module: GraphModule) -> None:
        nodes = module.graph.nodes
        self.inputs = [node.name for node in nodes if node.op == "placeholder"]
        # Weak, as the optimizer's tensors die with the optimizer and not with its code.
        self.attributes = {
            node.name: weakref.ref(_attribute(module, str(node.target)))
            for node in nodes
            if node.op == "get_attr"
        }
        self.calls = [node for node in nodes if _is_number(node) or _is_op(node)]
        self.result = next(iter(reversed(nodes))).args[0]

    def __call__(self, *inputs: Any) -> Any:
        values = dict(zip(self.inputs, inputs, strict=True))
        values.update({name: attribute() for name, attribute in self.attributes.items()})
        for node in self.calls:
            if _is_number(node):
                values[node.name] = values[node.args[0].name].item()  # type: ignore[union-attr]
                continue
            lists = [[values[x.name] for x in column] for column in node.args]  # type: ignore[union-attr]
            hyper = {
                name: values[value.name] if isinstance(value, Node) else value
                for name, value in node.kwargs.items()
            }
            node.target(*lists, **hyper)  # type: ignore[operator]
        return self.result


def _attribute(module: GraphModule, target: str) -> Tensor:
    value: Any = module
    for name in target.split("."):
        value = getattr(value, name)
    return value  # type: ignore[no-any-return]
