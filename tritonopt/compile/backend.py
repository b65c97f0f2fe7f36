"""The backend `tritonopt` of torch.compile: stock RMSprop and Rprop as one op, the rest as ever.

    >>> optimizer = torch.optim.RMSprop(model.parameters())
    >>> step = torch.compile(optimizer.step, backend="tritonopt")

A stock optimizer costs Inductor a kernel per parameter. For this backend dynamo makes one op of
each call of torch's functional `rmsprop` and `rprop`. What the op does not take is traced as ever.
A graph goes to Inductor, unless it has nothing but these ops.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._dynamo.eval_frame import innermost_backend
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import TracingContext
from torch.fx import GraphModule
from torch.optim.rmsprop import rmsprop
from torch.optim.rprop import rprop
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tritonopt import ops
from tritonopt.device import path
from tritonopt.eligible import HALF_OR_SINGLE

_left: WeakKeyDictionary[TracingContext, list[str]] = WeakKeyDictionary()  # and why, by graph


def tritonopt(
    module: GraphModule, inputs: Sequence[Any], *, mode: str | None = None,
    options: dict[str, Any] | None = None, report: Callable[[str], None] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """Compiles a graph of dynamo, and hands a text about it to `report`.

    Not called by users, but by `torch.compile(fn, backend="tritonopt", mode=..., options=...)`.
    The mode and the options are Inductor's, for what is left to it.
    """
    inductor = torch._TorchCompileInductorWrapper(mode, options, None)  # raises what torch raises
    *nodes, output = module.graph.nodes
    calls = [node for node in nodes if getattr(node.target, "namespace", "") == "tritonopt"]
    if report is not None:
        report(f"{len(nodes) + 1} nodes\n  " + "\n  ".join(_what_became_of(calls)))
    computed = [node for node in nodes if node.op not in ("placeholder", "get_attr")]
    computed = [node for node in computed if node.target != "item"]  # of what was made of a number
    if calls == computed and not output.all_input_nodes:
        return module.forward
    return inductor(module, inputs)  # type: ignore[no-any-return]


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Compiles a function with the backend, calls it once, and says what became of each graph.
    Dynamo is reset before and after: what else was compiled will be compiled again.

    Args:
        fn: what is to be compiled. It runs: the optimizer takes a step.
        args, kwargs: the function's arguments.

    Example:
        >>> print(tritonopt.backend.explain(optimizer.step))
        graph 0, 10 nodes
          replaced: RMSprop of 2 parameters (lr=0.01, alpha=0.99, eps=1e-08, weight_decay=0, ...)
    """
    reports: list[str] = []
    torch._dynamo.reset()
    torch.compile(fn, backend=partial(tritonopt, report=reports.append))(*args, **kwargs)
    torch._dynamo.reset()
    nothing = "no graph was compiled: are there gradients, and is the optimizer torch's?"
    return "\n".join(f"graph {i}, {text}" for i, text in enumerate(reports)) or nothing


def _what_became_of(calls: list[Any]) -> list[str]:
    lines = []
    for call in calls:
        title = ops.RULES[call.target._opname].title
        options = ", ".join(f"{name}={value}" for name, value in call.kwargs.items())
        lines.append(f"replaced: {title} of {len(call.args[0])} parameters ({options})")
    lines += [f"left to Inductor: {what}" for what in _left.get(TracingContext.get(), [])]
    return lines or ["left to Inductor: no step of a stock RMSprop or Rprop"]


@torch.compiler.assume_constant_result
def _takes(name: str) -> bool:
    """Whether the graph is for this backend, and the op takes the `lists` of what calls this.

    What it looks at, dynamo guards, as the tensors are inputs of the graph. Tracing the checks
    would take twice as long as everything else.
    """
    output: Any = InstructionTranslator.current_tx().output
    backend: Any = innermost_backend(output.compiler_fn)
    backend = getattr(backend, "compiler_fn", backend)
    if getattr(backend, "func", backend) is not tritonopt:
        return False
    columns = output.current_tx.symbolic_locals["lists"].realize().items
    why = _why_not([[_fake(x.realize()) for x in column.realize().items] for column in columns])
    if why:
        _left.setdefault(output.tracing_context, []).append(f"{name}, as {why}")
    return not why


def _fake(variable: Any) -> Any:
    """The fake tensor that dynamo has of a tensor; None of anything else."""
    return variable.as_proxy().node.meta["example_value"] if variable.is_tensor() else None


def _why_not(lists: Sequence[Sequence[Any]]) -> str:
    *columns, steps = lists
    params, grads, *states = columns
    tensors = [tensor for column in lists for tensor in column]
    if not params:
        return "there is no gradient"
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return "a step is a number"
    if any(is_traceable_wrapper_subclass(tensor) for tensor in tensors):
        return "a tensor is of a subclass"
    if any(tensor.layout is not torch.strided for tensor in tensors):
        return "a tensor is sparse"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "autograd differentiates it"
    dtype, device = params[0].dtype, params[0].device
    if dtype not in (*HALF_OR_SINGLE, torch.float64):
        return f"it is of {dtype}"
    if path(device)[0] is None:
        return path(device)[1]
    if any((t.dtype, t.device) != (dtype, device) for column in columns for t in column):
        return "it mixes dtypes or devices"
    if any(t.size() != p.size() for c in columns for t, p in zip(c, params, strict=False)):
        return "a gradient or state has not its parameter's shape"
    written = [t.untyped_storage()._cdata for column in (params, *states, steps) for t in column]
    if len(set(written)) < len(written):
        return "it writes to a memory twice"
    if not {grad.untyped_storage()._cdata for grad in grads}.isdisjoint(written):
        return "a gradient is a parameter's memory, or its state's"
    return ""


def _substitute(function: Any, op: Any) -> None:
    """From now on dynamo traces an op where the stock optimizer calls `function`."""
    inlined = FunctionType(function.__code__, function.__globals__, closure=function.__closure__)
    taken = {x.name: x.has_default_value() for x in op.default._schema.arguments}
    count = [*taken.values()].count(False)  # of lists
    name, names = function.__name__, [*inspect.signature(function).parameters][count:]

    @torch.compiler.substitute_in_graph(function, skip_signature_check=True)
    def traced(*args: Any, **options: Any) -> None:
        lists: Any = args[:count]
        if len(args) < count or not _takes(name):
            inlined(*args, **options)
            return
        options = {**dict(zip(names, args[count:], strict=False)), **options}
        if name == "rmsprop":
            *lists, grad_avgs, buffers, steps = lists
            buffers = buffers if options["momentum"] > 0 else []
            lists = [*lists, grad_avgs if options["centered"] else [], buffers, steps]
        overload = op.tensor_lr if isinstance(options.get("lr"), Tensor) else op.default
        overload(*lists, **{key: value for key, value in options.items() if key in taken})


_substitute(rmsprop, torch.ops.tritonopt.rmsprop_)
_substitute(rprop, torch.ops.tritonopt.rprop_)
