"""Sees to it that a graph of Inductor returns what was read, when it was read (torch 2.11 to 2.15).

Inductor drops copies of tensors that nothing else writes to, while what an op writes is still a
tensor of its own; then it lets the op write in place, and who had asked for a copy of a parameter
gets the parameter. What is negated twice, it does not drop.

And what it has yet to compute when an op writes what that is made of, it computes after the op. It
computes before the op what needs to be in memory, as `as_strided` does, and results that have
dimensions; not what is copied to an input of the graph at its end: an average of the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._dynamo.callback import callback_handler
from torch._higher_order_ops.auto_functionalize import auto_functionalized, auto_functionalized_v2
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.fx_utils import get_node_storage
from torch.fx import Graph, Node

_aten = torch.ops.aten
ARITHMETIC = {_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor}
"""Which Inductor takes for copies where the other operand is 0 or 1."""


class KeepCopies(CustomGraphPass):
    """A pass of Inductor: what copies our ops' results is computed, and reads are in time."""

    def __call__(self, graph: Graph) -> None:
        calls = _calls(graph)
        if calls:
            self._compute_copies(graph, calls)
            self._store_reads(graph, calls[-1])

    def _compute_copies(self, graph: Graph, calls: list[Node]) -> None:
        from torch._inductor.fx_passes.post_grad import noop_registry

        written = {get_node_storage(user) for node in calls for user in node.users}
        written.discard(None)
        for node in graph.nodes:
            may_copy = node.target in noop_registry or node.target in ARITHMETIC
            is_result = node.op == "output"  # of what was a copy before it was decomposed
            if is_result or (may_copy and get_node_storage(node) not in written):
                for source in node.all_input_nodes:
                    if get_node_storage(source) in written:
                        with graph.inserting_before(source.next if is_result else node):
                            node.replace_input_with(source, _computed(graph, source))

    def _store_reads(self, graph: Graph, last: Node) -> None:
        """Results without dimensions, and what is copied to inputs, if they are read before."""
        result = graph.output_node()
        inputs = {get_node_storage(node) for node in graph.find_nodes(op="placeholder")}
        reads = [(result, node) for node in result.all_input_nodes if _dim(node) == 0]
        copies = graph.find_nodes(op="call_function", target=_aten.copy_.default)
        reads += [(copy, copy.args[1]) for copy in copies]
        for user, node in reads:
            if _dim(node) is not None and node < last and get_node_storage(node) not in inputs:
                user.replace_input_with(node, _stored(graph, node))

    def uuid(self) -> bytes:
        """For the caches of what was compiled."""
        return get_hash_for_files((__file__,))


_keep_copies = KeepCopies()


def _calls(graph: Graph) -> list[Node]:
    functional = (auto_functionalized, auto_functionalized_v2)
    nodes = [node for node in graph.nodes if node.target in functional]
    return [node for node in nodes if getattr(node.args[0], "namespace", "") == "tritonopt"]


def _computed(graph: Graph, source: Node) -> Node:
    """The same values, negated twice."""
    for _ in range(2):
        value = source.meta["val"]
        negate = _aten.logical_not if value.dtype is torch.bool else _aten.neg
        source = graph.call_function(negate.default, (source,))
        with value.fake_mode:
            source.meta["val"] = negate.default(value)
    return source


def _dim(node: Any) -> int | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else None


def _stored(graph: Graph, node: Node) -> Node:
    """The same values, in memory."""
    value = node.meta["val"]
    with graph.inserting_after(node):
        stored = graph.call_function(_aten.as_strided.default, (node, [], []))
    stored.meta["val"] = value

    def lengths(op: Any, given: Sequence[Any]) -> list[Any]:
        found = []
        for dim, length in enumerate(given):
            if not isinstance(length, int):
                with graph.inserting_before(stored):
                    symbol = graph.call_function(op, (node, dim))
                symbol.meta["val"] = length
                length = symbol
            found.append(length)
        return found

    sizes = lengths(_aten.sym_size.int, value.size())
    stored.args = (node, sizes, lengths(_aten.sym_stride.int, value.stride()))
    return stored


def keep_in_this_compilation() -> None:
    """From now, while a graph is being traced, until it is compiled: if there is no pass yet."""
    if config.joint_custom_pre_pass is None:
        config.joint_custom_pre_pass = _keep_copies
    if _end not in callback_handler.end_callbacks:  # where it stays
        callback_handler.register_end_callback(_end)


def _end(_: object) -> None:
    if config.joint_custom_pre_pass is _keep_copies:
        config.joint_custom_pre_pass = None
