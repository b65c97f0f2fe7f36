"""The sweep of `Optimizer.compile()`: Inductor fuses the eager rule to one loop over a flat span.

A graph takes one flat tensor per column, whatever the number of parameters, with dynamic sizes:
spans and large tensors of all sizes share it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from operator import itemgetter
from types import FunctionType, NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo.guards import GlobalStateGuard
from torch._dynamo import eval_frame

from tritonopt.compile.inductor import inductor, trust_processor
from tritonopt.eager import Scratch
from tritonopt.sweep import RECENT_ROOMS, SERIAL, Sweep

SERIAL_LOOP, PARALLEL_LOOP = {"cpp.threads": 1}, {"cpp.dynamic_threads": True}
"""Of Inductor, which lets the first size that it compiles for decide for all, on disk even."""

_graphs: dict[Any, Graph] = {}


class CompiledSweep(Sweep):
    path = "compiled"  # in `describe()`

    def __init__(
        self,
        rule: Callable[..., None],
        params: Sequence[Tensor],
        columns: Sequence[Sequence[Tensor] | None],
        **kwargs: Any,
    ) -> None:
        super().__init__(rule, params, columns)
        self.kwargs = kwargs
        self._shortcuts: dict[tuple[int, torch.dtype], Shortcut] = {}  # of gradients

    def _piece(self, params: Sequence[Tensor]) -> int:
        return 2**62  # a fused loop needs no pieces that stay in cache

    def _update(self, flats: Sequence[Tensor | None], grad: Tensor, hyper: dict[str, Any]) -> None:
        hyper = _immutable(hyper)
        kind = grad.numel(), grad.dtype
        shortcut = self._shortcuts.get(kind)
        if shortcut is not None and shortcut.fits(hyper):
            shortcut.take(grad, flats)
        elif grad.numel() < 2:  # sizes 0 and 1 would each be a graph of their own
            super()._update(flats, grad, hyper)
        else:
            shortcut = self._through_dynamo(flats, grad, hyper)
            if len(self._shortcuts) >= RECENT_ROOMS:
                self._shortcuts.clear()
            if shortcut is not None:
                self._shortcuts[kind] = shortcut

    def _through_dynamo(
        self, flats: Sequence[Tensor | None], grad: Tensor, hyper: dict[str, Any]
    ) -> Shortcut | None:
        """Updates; how to do the same without dynamo, if that can be told."""
        constants = {name: value for name, value in hyper.items() if _is_constant(name, value)}
        names = [name for name in hyper if name not in constants]
        numbers = _numbers(hyper, names)
        bare = [None if flat is None else _bare(flat) for flat in flats]
        grad = _bare(grad)
        numel = grad.numel()
        dtypes = [flat if flat is None else flat.dtype for flat in (*flats, grad)]
        graph = _graph(self.rule, dtypes, numel > SERIAL, constants, self.kwargs)
        # Else dynamo makes symbols of floats, and bakes in their values without a guard.
        with torch._dynamo.config.patch(specialize_float=True):
            ran = graph.run(self.rule, self.dtype, bare, grad, constants, names, numbers)
        if ran is None:
            return None
        order = _order(ran.inputs, [numel, numbers, grad, *bare])
        return None if order is None else Shortcut(ran.code, order, numel, names, numbers, hyper)


def _immutable(hyper: dict[str, Any]) -> dict[str, Any]:
    """With the values that tensors have now, and with the scalar that `step` makes for a loop."""
    values: dict[str, Any] = {
        name: v if isinstance(v, (int, float, str, NoneType)) else float(v)
        for name, v in hyper.items()
    }
    if "step" in values:
        values["correction"] = 1 - values["alpha"] ** values.pop("step")
    return values


def _bare(tensor: Tensor) -> Tensor:
    """The same memory, told from no other: neither a view nor with an offset, on which dynamo has
    guards, and of which it makes symbols."""
    tensor = tensor.detach()
    if tensor.storage_offset() == 0:
        return tensor.data
    return torch.from_dlpack(torch.utils.dlpack.to_dlpack(tensor))


def _is_constant(name: str, value: Any) -> bool:
    """Whether the value decides about the graph. Other numbers are its inputs."""
    if isinstance(value, (bool, str, NoneType)):
        return True
    # Without a decay there is nothing to add; up to 0.5, `lerp` goes from its other end.
    return (name == "weight_decay" and value == 0) or (name == "alpha" and value <= 0.5)


def _numbers(hyper: dict[str, Any], names: list[str]) -> Tensor:
    """One input for all of them: each input of a graph costs 2 us per call."""
    values = [float(hyper[name]) for name in names]
    return torch.tensor(values, dtype=torch.float64, device="cpu")


class Graph:
    """A compiled update, shared by all optimizers of the same dtypes, constants and options."""

    def __init__(self, kwargs: dict[str, Any], loop: dict[str, Any]) -> None:
        self._loop = loop
        # With a code object of its own: dynamo limits the graphs per code object, and would run
        # what is beyond the limit without compiling it.
        function = FunctionType(update.__code__.replace(), globals(), update.__name__)
        kwargs = {"dynamic": True, **kwargs}
        self._compiled = torch.compile(function, **kwargs)  # raises where an option is wrong
        if kwargs.get("backend", "inductor") == "inductor":
            trust_processor()
            self._compiled = torch.compile(function, **{**kwargs, "backend": self._inductor})
        self._ran = threading.local()

    def run(self, *args: Any) -> Ran | None:
        """Updates; what ran, if it was Inductor's code."""
        self._ran.last = None
        self._compiled(*args)
        ran, self._ran.last = self._ran.last, None
        return ran

    def _inductor(
        self, module: Any, inputs: Any, options: dict[str, Any] | None = None, **mode: Any
    ) -> Callable[..., Any]:
        """Torch's backend of that name, whose code notes when it runs."""
        options = options or {}
        if not options.keys() & {*SERIAL_LOOP, *PARALLEL_LOOP}:
            options = {**options, **self._loop}
        code = inductor(module, inputs, options=options, **mode)

        def noted(*inputs: Any) -> Any:
            self._ran.last = Ran(code, inputs)
            return code(*inputs)

        return noted


class Ran(NamedTuple):
    code: Callable[..., Any]
    inputs: tuple[Any, ...]


class Shortcut:
    """The way to compiled code past dynamo, whose guards and frames cost 30 us, 100 us if cold.

    The guards look at dtypes, sizes, hyperparameters and torch's global state. Sizes and dtypes are
    the sweep's; while all the others are the same, so is the code. Numbers that are inputs may
    change.
    """

    def __init__(
        self,
        code: Callable[..., Any],
        order: list[int],
        numel: int,
        names: list[str],
        numbers: Tensor,
        hyper: dict[str, Any],
    ) -> None:
        self.code = code
        self.pick = itemgetter(*order)
        self.numel = numel
        self.names = names
        self.numbers = numbers
        self.hyper = hyper
        self.state = GlobalStateGuard()
        self.stance = eval_frame._stance

    def fits(self, hyper: dict[str, Any]) -> bool:
        if eval_frame._stance is not self.stance or not self.state.check():
            return False
        return hyper == self.hyper or self._take_over(hyper)

    def _take_over(self, hyper: dict[str, Any]) -> bool:
        """Makes other numbers its inputs, if nothing else has changed."""
        changed = [name for name, value in hyper.items() if value != self.hyper[name]]
        if any(name not in self.names or _is_constant(name, hyper[name]) for name in changed):
            return False
        self.numbers = _numbers(hyper, self.names)
        self.hyper = hyper
        return True

    def take(self, grad: Tensor, flats: Sequence[Tensor | None]) -> None:
        self.code(*self.pick((self.numel, self.numbers, grad, *flats)))


def _order(inputs: Sequence[Any], known: Sequence[Any]) -> list[int] | None:
    """Where the inputs of a graph stand among known ones; None if any is something else."""
    order = []
    for x in inputs:
        same = [i for i, y in enumerate(known) if x is y or (type(x) is type(y) is int and x == y)]
        if not same:
            return None
        order.append(same[0])
    return order


def _graph(
    rule: Callable[..., None],
    dtypes: list[Any],
    many: bool,
    constants: dict[str, Any],
    kwargs: dict[str, Any],
) -> Graph:
    options = tuple(sorted((name, repr(value)) for name, value in kwargs.items()))
    key = (rule, tuple(dtypes), many, tuple(constants.items()), options)
    if key not in _graphs:
        _graphs[key] = Graph(kwargs, PARALLEL_LOOP if many else SERIAL_LOOP)
    return _graphs[key]


def update(
    rule: Callable[..., None],
    dtype: torch.dtype,
    flats: list[Tensor | None],
    grad: Tensor,
    constants: dict[str, Any],
    names: list[str],
    numbers: Tensor,
) -> None:
    """One step in the compute dtype; Inductor makes the copies part of the loop."""
    hyper = {**constants, **dict(zip(names, numbers.unbind(), strict=True))}
    work = [None if flat is None else flat.to(dtype) for flat in flats]
    rule(work[0], grad.to(dtype), *work[1:], Scratch(), **hyper)
    for flat, computed in zip(flats, work, strict=True):
        if flat is not None and computed is not None and computed.dtype != flat.dtype:
            flat.copy_(computed)
