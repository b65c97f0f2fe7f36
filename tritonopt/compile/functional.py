"""Compilers see an op as one that returns what it writes: `rmsprop_` as its twin `rmsprop`.

Which value was read before it, and which after it, is then said by the graph.
"""

import re
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import compute_overlapping_tensors
from torch._ops import OpOverload

TWINS: dict[OpOverload, OpOverload] = {}  # by the op that writes in place


def define_twin(library: torch.library.Library, overload: OpOverload, schema: str) -> None:
    """Defines the functional twin of an op with a schema, to which a graph turns it."""
    kind = overload._overloadname
    packet = overload._opname.removesuffix("_")
    name = packet if kind == "default" else f"{packet}.{kind}"
    schema = re.sub(r"\(\w!\)", "", schema).replace("-> ()", "-> Tensor[]")
    library.define(name + schema, tags=[torch.Tag.cudagraph_unsafe])
    library.impl(name, partial(_on_copies, overload), "CompositeExplicitAutograd")
    torch.library.register_fake(f"tritonopt::{name}", _fake, lib=library)
    TWINS[overload] = getattr(getattr(torch.ops.tritonopt, packet), kind)
    overload.py_functionalize_impl(partial(_functionalize, overload))


def written(lists: Sequence[Any]) -> list[Any]:
    """All of an op's lists in one, without the gradients, which it only reads."""
    return [x for number, column in enumerate(lists) if number != 1 for x in column or ()]


def _functionalize(overload: OpOverload, context: Any, *lists: Any, **hyper: Any) -> None:
    """What a graph gets in place of the op: its functional twin, and the results as new values."""
    given = context.unwrap_tensors((lists, hyper))
    _check_aliases(*given)
    with context.redispatch_to_next():
        results = TWINS[overload](*given[0], **given[1])
    for tensor, result in zip(written(lists), results, strict=True):
        context.replace(tensor, result)
        context.commit_update(tensor)
        context.sync(tensor)
    torch.autograd.graph.increment_version(written(lists))  # a backward in the graph must notice


def _check_aliases(lists: Sequence[list[Tensor]], hyper: dict[str, Any]) -> None:
    """Raises where the order of the writes would matter, which a graph does not keep."""
    owners: dict[Any, list[Tensor]] = {}
    for tensor in written(lists):
        owners.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    read = [*lists[1], *(x for x in hyper.values() if isinstance(x, Tensor))]
    beside = [[*owners.get(x.untyped_storage()._cdata, []), x] for x in read]
    if any(map(compute_overlapping_tensors, [*owners.values(), *beside])):
        raise NotImplementedError(
            "tritonopt: in a compiled graph, what an op writes may share memory with no other input"
        )


def _on_copies(overload: OpOverload, *lists: Any, **hyper: Any) -> list[Tensor]:
    pairs = [(i, column or []) for i, column in enumerate(lists)]
    copies = [[t.clone() if i != 1 else t for t in column] for i, column in pairs]
    overload(*copies, **hyper)
    return written(copies)


def _fake(*lists: Any, **hyper: Any) -> list[Tensor]:
    if "torch._inductor.lowering" in sys.modules:  # the graph may become one of Inductor's
        from tritonopt.compile import lowering as lowering
    return [torch.empty_like(tensor) for tensor in written(lists)]
