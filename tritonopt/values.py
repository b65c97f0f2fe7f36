"""What a traced graph computes, as terms: the values of memory, not the way there.

In-place or not, foreach or a loop, decomposed or whole: updates of equal effect have equal terms.
Terms are made once, so that equal ones are the same number.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node


class Unknown(Exception):
    """The node does something that has no term."""


class Terms:
    """Sums, products and the like of leaves (values that memory has before) and constants."""

    def __init__(self) -> None:
        self.parts: list[tuple[Any, ...]] = []
        self._numbers: dict[tuple[Any, ...], int] = {}

    def make(self, *parts: Any) -> int:
        number = self._numbers.setdefault(parts, len(self.parts))
        if number == len(self.parts):
            self.parts.append(parts)
        return number

    def const(self, value: float) -> int:
        return self.make("const", float(value))

    def scale(self, x: int, factor: float) -> int:
        kind, *rest = self.parts[x]
        if kind == "const":
            return self.const(rest[0] * factor)
        if kind == "scale" and abs(rest[1]) == 1:  # exact, unlike the product of two factors
            return self.scale(rest[0], rest[1] * factor)
        return x if factor == 1 else self.make("scale", x, float(factor))

    def mul(self, x: int, y: int) -> int:
        for one, other in ((x, y), (y, x)):
            kind, *rest = self.parts[one]
            if kind == "const":
                return self.scale(other, rest[0])
            if kind == "scale" and rest[1] == -1 and x != y:
                return self.scale(self.mul(rest[0], other), -1)
        return self.make("mul", min(x, y), max(x, y))

    def div(self, x: int, y: int) -> int:
        kind, *rest = self.parts[y]
        if kind == "scale" and rest[1] == -1:
            return self.scale(self.div(x, rest[0]), -1)
        return self.make("div", x, y)

    def add(self, x: int, y: int, alpha: int | None = None) -> int:
        return self.make("add", x, y if alpha is None else self.mul(y, alpha))

    def sub(self, x: int, y: int) -> int:
        return self.add(x, self.scale(y, -1))

    def addcmul(self, x: int, y: int, z: int, *, value: int | None = None) -> int:
        return self.add(x, self.mul(y, z), value)

    def addcdiv(self, x: int, y: int, z: int, *, value: int | None = None) -> int:
        return self.add(x, self.div(y, z), value)

    def fma(self, x: int, y: int, z: int) -> int:
        return self.add(z, self.mul(x, y))

    def lerp(self, x: int, y: int, weight: int) -> int:
        return self.add(x, self.sub(y, x), weight)

    def neg(self, x: int) -> int:
        return self.scale(x, -1)

    def setitem(self, x: int, mask: int, value: int) -> int:
        return self.make("where", mask, value, x)

    def copy(self, x: int, source: int) -> int:
        return source

    def same(self, x: int) -> int:
        return x

    def plain(self, kind: str) -> Callable[..., int]:
        return lambda *operands: self.make(kind, *operands)


KINDS = {
    "add": "add", "iadd": "add_", "sub": "sub", "isub": "sub_", "mul": "mul", "imul": "mul_",
    "div": "div", "truediv": "div", "itruediv": "div_", "neg": "neg", "addcmul": "addcmul",
    "addcdiv": "addcdiv", "fma": "fma", "lerp": "lerp", "copy_": "copy_", "clone": "same",
    "item": "same", "full_like": "full_like", "setitem": "setitem_", "sqrt": "sqrt",
    "sign": "sign", "gt": "gt", "lt": "lt", "eq": "eq", "where": "where", "clamp": "clamp",
}  # fmt: skip
"""Names of functions, methods and operators; what ends in _ writes its first operand."""

DROPPED = {"memory_format"}


class Segment(NamedTuple):
    """The value of one memory from one unknown access of it to the next."""

    memory: int
    leaf: int
    term: int
    writes: list[Node]
    start: int  # positions in the graph
    stop: int


class Trace:
    """The terms of a graph, and who reads and writes which memory."""

    def __init__(self, module: GraphModule) -> None:
        self.terms = Terms()
        self.module = module
        self.position = {node: i for i, node in enumerate(module.graph.nodes)}
        self.holders: dict[int, Node] = {}  # of each memory: the first node that is all of it
        self.segments: list[Segment] = []
        self.known: set[Node] = set()
        self.writers: dict[int, list[Node]] = {}  # all known ones, by memory
        self._memories: dict[Any, int | None] = {}
        self._elements: dict[Node, list[int]] = {}
        self._scalars: dict[Node, int] = {}
        self._open: dict[int, tuple[int, list[Node], int]] = {}  # leaf, writes, start
        self._values: dict[int, int] = {}
        for node in module.graph.nodes:
            self._visit(node)
        for memory in list(self._open):
            self._close(memory, len(self.position))

    def tensor(self, node: Any) -> Tensor | None:
        """The node's tensor, as far as it is known: its shape, layout and whose memory it is."""
        if not isinstance(node, Node):
            return None
        value = node.meta.get("example_value")
        if value is None and node.op == "get_attr":
            value = getattr(self.module, str(node.target), None)
        return value if isinstance(value, Tensor) else None

    def memory(self, node: Any) -> int | None:
        """Which memory the node's tensor lies in: what is written there, all its tensors see."""
        if node not in self._memories:
            tensor = self.tensor(node)
            try:
                storage = None if tensor is None else tensor.untyped_storage()
            except (NotImplementedError, RuntimeError):  # sparse tensors, some subclasses
                storage = None
            self._memories[node] = None if storage is None else storage._cdata
        return self._memories[node]

    def accesses(self, node: Node) -> set[int]:
        """Every memory the node reads or writes."""
        found = {self.memory(argument) for argument in node.all_input_nodes}
        for argument in node.all_input_nodes:
            if argument in self._elements:  # the list that a foreach function returned
                found |= {self.memory(user) for user in argument.users}
        return {memory for memory in found if memory is not None}

    def _visit(self, node: Node) -> None:
        here = self.position[node]
        if node.op in ("placeholder", "get_attr"):
            self._hold(node, here)
            return
        try:
            self._evaluate(node)
            self.known.add(node)
        except Unknown:
            for memory in self.accesses(node):
                self._close(memory, here)
            self._hold(node, here)

    def _hold(self, node: Node, here: int) -> None:
        memory = self.memory(node)
        if memory is not None and memory not in self._values:
            self.holders.setdefault(memory, node)
            self._begin(memory, here)

    def _begin(self, memory: int, here: int) -> None:
        leaf = self.terms.make("leaf", memory, here)
        self._open[memory], self._values[memory] = (leaf, [], here), leaf

    def _close(self, memory: int, here: int) -> None:
        if memory in self._open:
            leaf, writes, start = self._open[memory]
            term = self._values[memory]
            self.segments.append(Segment(memory, leaf, term, writes, start, here))
            self._begin(memory, here)

    def _operand(self, argument: Any) -> int:
        if isinstance(argument, (int, float)) and not isinstance(argument, bool):
            return self.terms.const(argument)
        if not isinstance(argument, Node):
            raise Unknown
        if argument in self._scalars:
            return self._scalars[argument]
        memory = self.memory(argument)
        if memory not in self._values or not self._is_whole(argument):
            raise Unknown
        return self._values[memory]

    def _is_whole(self, node: Node) -> bool:
        tensor, holder = self.tensor(node), self.tensor(self.holders[self.memory(node)])  # type: ignore[index]
        assert tensor is not None and holder is not None
        return bool(
            tensor.dtype == holder.dtype
            and tensor.size() == holder.size()
            and tensor.stride() == holder.stride()
            and tensor.storage_offset() == holder.storage_offset()
        )

    def _evaluate(self, node: Node) -> None:
        name, is_foreach = _name(node)
        if name == "getitem" and node.args[0] in self._elements:
            self._set(node, self._elements[node.args[0]][node.args[1]])  # type: ignore[index]
            return
        kind = KINDS.get(name, KINDS.get(name.removesuffix("_"), ""))
        if not kind or node.op == "output":
            raise Unknown
        writes = name.endswith("_") or kind.endswith("_")
        kind = kind.removesuffix("_")
        function = getattr(self.terms, kind, None) or self.terms.plain(kind)
        kwargs = {k: v for k, v in node.kwargs.items() if k not in DROPPED}
        if not set(kwargs) <= {"alpha", "value"}:
            raise Unknown
        if kind == "full_like":
            self._set(node, self._filled(node))
            return
        rows = _rows(node.args) if is_foreach else [node.args]
        for row in rows:
            self._check_kind(kind, row if writes or is_foreach else [node, *row])
        options = {k: self._operand(v) for k, v in kwargs.items()}
        if kind in ("clamp", "gt", "lt", "eq") and len(node.args) != (3 if kind == "clamp" else 2):
            raise Unknown
        values = [self._apply(function, [self._operand(x) for x in row], options) for row in rows]
        if writes:
            targets = [row[0] for row in rows]
            self._write(node, targets, values)
        elif is_foreach:
            self._elements[node] = values
        else:
            self._set(node, values[0])

    def _filled(self, node: Node) -> int:
        """The constant as its tensor holds it."""
        tensor, value = self.tensor(node), node.args[-1]
        if tensor is None or not tensor.is_floating_point() or not isinstance(value, (int, float)):
            raise Unknown
        return self.terms.const(float(torch.tensor(value, dtype=tensor.dtype, device="cpu")))

    def _check_kind(self, kind: str, row: Sequence[Any]) -> None:
        """Only between tensors of one dtype and size is an operator what it is between numbers."""
        tensors = [t for t in map(self.tensor, row) if t is not None]
        if kind == "copy" and len({t.dtype for t in tensors}) > 1:
            raise Unknown
        several = [t for t in tensors if t.dim() and t.dtype != torch.bool]
        if not all(isinstance(n, int) for t in several for n in t.size()):  # symbols: no parameter
            raise Unknown
        if len({(t.dtype, t.size()) for t in several}) > 1:
            raise Unknown

    def _apply(
        self, function: Callable[..., int], operands: list[int], options: dict[str, int]
    ) -> int:
        try:
            return function(*operands, **options)
        except TypeError:
            raise Unknown from None

    def _set(self, node: Node, value: int) -> None:
        memory = self.memory(node)
        if memory is None:
            self._scalars[node] = value
            return
        if memory in self._values:  # an alias where a value was expected
            raise Unknown
        self.holders[memory] = node
        self._begin(memory, self.position[node])
        self._values[memory] = value

    def _write(self, node: Node, targets: Sequence[Any], values: Sequence[int]) -> None:
        memories = [self.memory(target) for target in targets]
        if None in memories or len(set(memories)) < len(memories):
            raise Unknown
        for memory, value in zip(memories, values, strict=True):
            assert memory is not None
            self._values[memory] = value
            self._open[memory][1].append(node)
            self.writers.setdefault(memory, []).append(node)


def _name(node: Node) -> tuple[str, bool]:
    """The function's, method's or operator's plain name, and whether it is one of foreach."""
    if node.op == "call_method":
        return str(node.target), False
    if node.op != "call_function" or isinstance(node.target, str):
        return "", False
    if node.target is operator.getitem:
        return "getitem", False
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, _, name = node.target._schema.name.partition("::")
        return name if namespace in ("aten", "prims") else "", False
    if getattr(node.target, "__module__", None) not in (None, "torch", "_operator", "torch._C"):
        return "", False
    name = getattr(node.target, "__name__", "")
    return name.removeprefix("_foreach_"), name.startswith("_foreach_")


def _rows(args: Sequence[Any]) -> list[list[Any]]:
    lists = [argument for argument in args if isinstance(argument, (list, tuple))]
    if not lists or len({len(one) for one in lists}) != 1:
        raise Unknown
    return [
        [argument[i] if isinstance(argument, (list, tuple)) else argument for argument in args]
        for i in range(len(lists[0]))
    ]
