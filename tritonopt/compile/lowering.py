"""How Inductor compiles the ops: in place where nobody can tell, else on copies.

The graph says what every reader sees: an op returns new values, and what an input holds at the end
is copied to it there. The op writes to the input itself if that copy is all that follows: what it
copies is the op's result, and nobody reads the old value after the op.
"""

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.fx_utils import get_node_storage
from torch._inductor.lowering import lowerings
from torch._inductor.virtualized import V
from torch.fx import Node

from tritonopt.compile.functional import TWINS, written

_copy = torch.ops.aten.copy_.default
_clone = lowerings[torch.ops.aten.clone.default]


def _lower(overload: Any, *lists: Any, **hyper: Any) -> list[ir.TensorBox]:
    """Makes a call of the op of one of its functional twin."""
    node: Any = V.graph.current_node
    final_copies = _final_copies(node)

    def memory(argument: Node) -> Any:
        box = V.graph.env[argument]
        return box if argument in final_copies else ir.ExternKernel.copy_input(box)

    columns = [
        boxes if number == 1 else [memory(argument) for argument in column or ()]
        for number, (boxes, column) in enumerate(zip(lists, node.args, strict=True))
    ]
    for target, copy in final_copies.items():
        # Computes what is pending on the old value, which torch 2.11 to 2.15 would do too late.
        V.graph.mark_buffer_mutated(V.graph.env[target].get_name())
        copy.args = (target, target)  # nothing is left to be copied
    ir.FallbackKernel.create(overload, *columns, **hyper)
    # New values also to Inductor: what the graph returns is none of its inputs.
    return [_clone(box) for box in written(columns)]


def _final_copies(node: Any) -> dict[Any, Node]:
    """By input that the op may write to itself: the copy of the result, at the graph's end."""
    arguments = written(node.args)
    read = [*node.args[1], *node.kwargs.values()]
    for later in node.graph.nodes:
        if later > node:  # what a copy writes to is not read
            read += [later.args[1]] if later.target is _copy else later.all_input_nodes
    uses = Counter(_memory(x) for x in (*arguments, *read) if isinstance(x, Node))
    found = {}
    for copy in node.graph.find_nodes(op="call_function", target=_copy):
        target, result = copy.args
        is_result = result in node.users and arguments[result.args[1]] is target
        if is_result and uses[target] == 1 and not uses[get_node_storage(target)]:
            found[target] = copy
    return found


def _memory(node: Node) -> Any:
    """An input is its own: torch makes one of those that overlap. Others are their storage's."""
    return node if node.op == "placeholder" else get_node_storage(node)


for _overload, _twin in TWINS.items():
    lowerings[_twin] = partial(_lower, _overload)
