"""How Inductor compiles the ops: in place where that changes nothing, else on copies.

The graph says what every reader sees: an op returns new values, and what an input holds at the end
is copied to it there. An op may nevertheless write to the inputs themselves, if

- all that is still to be computed from an input is computed first. Inductor would register the op
  before that (torch 2.11 to 2.15), so it is asked for it before the op is made;
- who reads the old value later reads a copy;
- the results are new values also to Inductor: read from the memory where they lie when they are
  needed, and at the latest when it is written again. A result of the graph is a copy therefore.
"""

import operator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.fx_utils import get_node_storage
from torch._inductor.lowering import lowerings
from torch._inductor.virtualized import V
from torch.fx import Node

from tritonopt.compile.functional import TWINS, written

_aten = torch.ops.aten
AS_STRIDED = {_aten.as_strided.default, _aten.as_strided_.default, _aten.as_strided_scatter.default}
_HOMES = "tritonopt_homes"  # in the meta of an op's node


@dataclass
class Home:
    """Where a result lies."""

    box: ir.TensorBox
    input: Node | None = None
    is_final: bool = False
    """What the input holds at the end: no later op writes there."""


def register() -> None:
    for overload, twin in TWINS.items():
        lowerings.setdefault(twin, partial(_lower, overload))


def _lower(overload: Any, *lists: Any, **hyper: Any) -> list[ir.TensorBox]:
    node: Any = V.graph.current_node
    finals = {
        copy.args[0]: copy
        for copy in node.graph.find_nodes(op="call_function", target=_aten.copy_.default)
        if copy.args[0].op == "placeholder"
    }
    taken: set[int] = set()
    arguments = written(node.args)
    homes = [
        _home(argument, box, finals, taken)
        for argument, box in zip(arguments, written(lists), strict=True)
    ]
    _keep_old(node, {home.input for home in homes} & {*arguments})
    names = [home.box.get_name() for home in homes]
    grads = [
        _read(box, argument, names) for box, argument in zip(lists[1], node.args[1], strict=True)
    ]
    hyper = {
        name: _read(value, node.kwargs[name], names) if isinstance(value, ir.TensorBox) else value
        for name, value in hyper.items()
    }
    for name in names:
        V.graph.mark_buffer_mutated(name)
    boxes = iter([home.box for home in homes])
    params, *states = [list(islice(boxes, len(column))) for i, column in enumerate(lists) if i != 1]
    ir.FallbackKernel.create(overload, params, grads, *states, **hyper)
    node.meta[_HOMES] = homes
    _forget_copies(node, homes, finals)
    return [_value(home.box) for home in homes]


def _home(argument: Any, box: Any, finals: dict[Node, Node], taken: set[int]) -> Home:
    """Where the op writes: to an input, to where an earlier result lies, or to a copy."""
    home = None
    if argument in finals:
        home = Home(box, argument)
    elif argument.target is operator.getitem and _HOMES in argument.args[0].meta:
        source, index = argument.args
        home = source.meta[_HOMES][index]
    if home is None or home.is_final or id(home.box) in taken:
        home = Home(ir.ExternKernel.copy_input(box))
    taken.add(id(home.box))
    return Home(home.box, home.input)


def _keep_old(node: Node, written: set[Any]) -> None:
    """Gives a copy, made now, to who reads an input, or a view of it, after the op."""
    storages = {get_node_storage(argument) for argument in written} - {None}
    for alias in [n for n in V.graph.env if get_node_storage(n) in storages]:
        late = [user for user in alias.users if user not in V.graph.env and user is not node]
        late = [user for user in late if not _only_writes(user, alias)]
        if not late:
            continue
        if any(user.target in AS_STRIDED for user in late):
            raise NotImplementedError(
                "tritonopt: as_strided of what an op writes, after it, of a tensor from before it"
            )
        with node.graph.inserting_before(node):
            old = node.graph.call_function(_aten.clone.default, (alias,))
        old.meta.update(alias.meta)
        V.graph.env[old] = ir.ExternKernel.copy_input(V.graph.env[alias])
        for user in late:
            user.replace_input_with(alias, old)


def _only_writes(user: Node, target: Node) -> bool:
    is_copy = user.target is _aten.copy_.default
    return is_copy and user.args[0] is target and user.args[1] is not target


def _read(box: Any, argument: Node, written: list[str]) -> Any:
    """What the op only reads, in the layout that it has in eager."""
    strides = argument.meta["val"].stride()
    order = ir.get_stride_order(strides, V.graph.sizevars.shape_env)
    box = ir.ExternKernel.realize_input(ir.ExternKernel.require_stride_order(box, order))
    return ir.ExternKernel.copy_input(box) if box.get_name() in written else box


def _value(box: Any) -> ir.TensorBox:
    """The values in a memory, as they are now."""
    return ir.Pointwise.create(
        device=box.get_device(),
        dtype=box.get_dtype(),
        inner_fn=box.make_loader(),
        ranges=box.get_size(),
    )


def _forget_copies(node: Node, homes: list[Home], finals: dict[Node, Node]) -> None:
    """What lies in its input already need not be copied there at the end."""
    for result in node.users:
        home = homes[result.args[1]]  # type: ignore[index]
        final = finals.get(home.input) if home.input is not None else None
        if final is not None and final.args[1] is result:
            final.args = (home.input, home.input)
            home.is_final = True
