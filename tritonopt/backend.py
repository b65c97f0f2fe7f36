"""The backend `tritonopt` of torch.compile: stock RMSprop and Rprop as one op, the rest as ever.

    >>> optimizer = torch.optim.RMSprop(model.parameters())
    >>> step = torch.compile(optimizer.step, backend="tritonopt")

Compiling a stock optimizer costs Inductor a kernel's worth of work per parameter. This backend
finds the update in the graph that dynamo traced, whatever its flags, foreach or not, and puts one
`tritonopt::rmsprop_` or `tritonopt::rprop_` in its place. It compares values, not spellings: an
update is replaced if what it leaves in memory is what the op leaves there, and if nothing else
looks at the memory in between. Everything else goes to Inductor as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from tritonopt import ops as ops
from tritonopt.inductor import check, inductor
from tritonopt.rewrite import Report, Rewrite

_listeners: list[list[Report]] = []


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
    rewrite = Rewrite(module)
    replaced = rewrite.run()
    for reports in _listeners:
        reports.append(rewrite.report)
    if replaced and _is_update_only(module):
        return _Calls(module)
    return inductor(module, inputs, mode=mode, options=options, has_ops=bool(replaced))


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
        graph 0, 29 nodes
          replaced: RMSprop of 2 parameters (alpha=0.99, eps=1e-08, ..., lr=0.01, maximize=False)
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


def _is_update_only(module: GraphModule) -> bool:
    nodes = [n for n in module.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    output = next(iter(reversed(module.graph.nodes)))
    return not output.all_input_nodes and all(
        n.op == "call_function" and getattr(n.target, "namespace", "") == "tritonopt" for n in nodes
    )


class _Calls:
    """A graph that only calls ops: there is nothing to compile, and few Python lines to run."""

    def __init__(self, module: GraphModule) -> None:
        nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
        attributes = [n for n in module.graph.nodes if n.op == "get_attr"]
        # Weak, as the optimizer's tensors die with the optimizer and not with its code.
        self.attributes = [weakref.ref(_attribute(module, node.target)) for node in attributes]
        self.index = {node: number for number, node in enumerate([*nodes, *attributes])}
        self.calls = [
            (n.target, [[self.index[x] for x in column] for column in n.args], n.kwargs)
            for n in module.graph.nodes
            if n.op == "call_function"
        ]
        self.result = next(iter(reversed(module.graph.nodes))).args[0]

    def __call__(self, *inputs: Any) -> Any:
        pool = [*inputs, *[attribute() for attribute in self.attributes]]
        for op, columns, kwargs in self.calls:
            lists = [[pool[i] for i in column] for column in columns]
            hyper = {
                name: pool[self.index[value]] if value in self.index else value
                for name, value in kwargs.items()
            }
            op(*lists, **hyper)
        return self.result


def _attribute(module: GraphModule, target: Any) -> Tensor:
    value: Any = module
    for name in str(target).split("."):
        value = getattr(value, name)
    return value  # type: ignore[no-any-return]
