"""The sweep of `Optimizer.compile()`: Inductor fuses the eager rule to one loop over a flat span.

A graph takes one flat tensor per column, whatever the number of parameters, with dynamic sizes:
spans and large tensors of all sizes share it. Dynamo traces it, guards it, and runs it where it has
not yet run; where it has, its code is called past dynamo.
"""

import threading
from collections.abc import Callable, Sequence
from operator import itemgetter
from types import FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import eval_frame, lookup_backend
from torch._inductor import config
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.backends.cpu import get_cpu_capability
from torch.utils.dlpack import from_dlpack, to_dlpack

from tritonopt.eager import Scratch, apply
from tritonopt.quantized import blocks
from tritonopt.sweep import RECENT_ROOMS, SERIAL, Sweep

SERIAL_LOOP, PARALLEL_LOOP = {"cpp.threads": 1}, {"cpp.dynamic_threads": True}
"""Of Inductor, which lets the first size that it compiles for decide for all, on disk even."""

_graphs: dict[Any, "Graph"] = {}


def has_compiler(backend: Any) -> bool:
    """Whether the backend finds what it needs to compile for a CPU."""
    try:
        return backend != "inductor" or bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


class CompiledSweep(Sweep):
    path = "compiled"  # in `describe()`
    mean_alone = 2**11
    once = 2**62

    def __init__(
        self, *lists: Any, is_split: bool = False, is_quantized: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*lists, is_split=is_split, is_quantized=is_quantized)
        self.kwargs = kwargs
        # Of few and of many elements, and by the gradient's dtype: graph, numbers, what they are of
        self._known: dict[Any, tuple[Graph, Tensor, dict[str, Any]]] = {}

    def _piece(self, params: Sequence[Tensor]) -> int:
        return 2**62  # a fused loop needs no pieces that stay in cache

    def _update(
        self, flats: Sequence[Tensor | None], grad: Tensor, hyper: dict[str, Any],
        noise: Sequence[Tensor | None],
    ) -> None:  # fmt: skip
        numel = grad.numel()
        # Sizes 0 and 1 would each be a graph of their own. The mean of one tensor is in the graph;
        # those of several are not.
        if numel < 2 or callable(hyper.get("mean")):
            super()._update(flats, grad, hyper, noise)
            return
        hyper = _immutable(hyper)
        kind = numel > SERIAL, grad.dtype, tuple(bits is not None for bits in noise)
        known = self._known.get(kind)
        if known is None or known[2] != hyper:
            known = self._known[kind] = (*self._graph(*kind, hyper), hyper)
        graph, numbers, _ = known
        graph.run([numel, blocks(numel), numbers, grad, *flats, *noise])

    def _graph(
        self, many: bool, dtype: torch.dtype, noisy: tuple[bool, ...], hyper: dict[str, Any]
    ) -> Any:
        """The graph of an update, and the numbers that are its input."""
        kinds = bool, str, NoneType
        constants = {name: value for name, value in hyper.items() if isinstance(value, kinds)}
        numbers = {name: float(v) for name, v in hyper.items() if name not in constants}
        dtypes = [column and column[0].dtype for column in self.columns]
        options = repr(sorted(self.kwargs.items()))
        kind = self.rule, self.is_split, many, dtype, noisy, *dtypes, *constants.items(), *numbers
        kind = *kind, options
        if kind not in _graphs:
            loop = PARALLEL_LOOP if many else SERIAL_LOOP
            fixed = self.rule, constants, [*numbers], len(self.columns)
            _graphs[kind] = Graph(fixed, loop, self.kwargs)
        return _graphs[kind], torch.tensor([*numbers.values()], dtype=torch.float64, device="cpu")


def _immutable(hyper: dict[str, Any]) -> dict[str, Any]:
    """With the values that tensors have now, and with the scalar that `step` makes for a loop."""
    kinds = int, float, str, NoneType
    values: Any = {name: v if isinstance(v, kinds) else float(v) for name, v in hyper.items()}
    if {"step", "alpha"} <= values.keys():
        values["correction"] = 1 - values["alpha"] ** values.pop("step")
    return values


class Graph:
    """A compiled update, shared by all optimizers of the same dtypes, constants and options.

    It is a backend of dynamo itself: the one it is asked for, which also keeps the code.
    """

    def __init__(self, fixed: tuple[Any, ...], loop: Any, kwargs: dict[str, Any]) -> None:
        self._fixed, self._loop = fixed, loop
        self._backend = kwargs.get("backend", "inductor")
        # With a code object of its own: dynamo limits the graphs per code object, and would run
        # what is beyond the limit without compiling it.
        function = FunctionType(update.__code__.replace(), globals(), update.__name__)
        kwargs = {"dynamic": True, **kwargs}
        torch.compile(function, **kwargs)  # raises where an option is wrong
        self._compiled = torch.compile(function, **{**kwargs, "backend": self})
        self._lock = threading.RLock()
        self._inputs: list[Any] = []  # of the update that runs through dynamo
        self.reset()

    def reset(self) -> None:
        """Forgets what was compiled, as dynamo does when it calls this."""
        self._codes: dict[int, tuple[Any, ...]] = {}  # by the number of elements

    def run(self, inputs: list[Any]) -> None:
        """Updates, past dynamo if it has run for so many elements under the same stance.

        Its guards and frames cost 30 us, 100 us if cold. They look at dtypes and constants, which
        are this graph's own, at sizes, and at torch's settings, which an update does not depend on.
        """
        stance, code, pick = self._codes.get(inputs[0], (None, None, None))
        if stance is eval_frame._stance:
            code(*pick(inputs))
        else:
            self._through_dynamo(inputs)

    def _through_dynamo(self, inputs: list[Any]) -> None:
        *sizes, numbers = inputs[:3]
        tensors = inputs[3:]
        # The same memory, but no views, on which dynamo has guards, and of whose offsets symbols.
        bare = [t if t is None else from_dlpack(to_dlpack(t.detach())) for t in tensors]
        # Else dynamo makes symbols of floats, and bakes in their values without a guard.
        with self._lock, torch._dynamo.config.patch(specialize_float=True):
            self._inputs = [*sizes, numbers, *bare]
            self._compiled(self._fixed, numbers, *bare)
            self._inputs = []

    def __call__(self, module: Any, inputs: Any, **given: Any) -> Callable[..., Any]:
        eval_frame.cached_backends[id(self)] = self  # those of which a reset of dynamo tells
        if self._backend == "inductor":
            options = given.get("options") or {}
            if not options.keys() & {*SERIAL_LOOP, *PARALLEL_LOOP}:
                options = {**options, **self._loop}
            # Torch knows that it can use the processor's AVX instructions. Inductor would compile
            # a program for each set of them: without its cache that is 4 of 10 s to the first step.
            if config.cpp.vec_isa_ok is None and get_cpu_capability() in ("AVX2", "AVX512"):
                options = {"cpp.vec_isa_ok": True, **options}
            compile_: Any = torch._TorchCompileInductorWrapper(given.get("mode"), options, None)
            code = compile_(module, inputs)
        else:
            code = lookup_backend(self._backend)(module, inputs, **given)

        def noted(*inputs: Any) -> Any:
            """Runs the code, and keeps it with the order of its inputs."""
            places = {id(known): place for place, known in enumerate(self._inputs)}
            places.update({size: place for place, size in enumerate(self._inputs[:2])})
            order = [places.get(x if isinstance(x, int) else id(x)) for x in inputs]
            if None not in order:
                if len(self._codes) >= RECENT_ROOMS:
                    self.reset()
                self._codes[self._inputs[0]] = eval_frame._stance, code, itemgetter(*order)
            return code(*inputs)

        # Where dynamo breaks the graph of a rule, none of its graphs is the whole update.
        return code if module.graph.output_node().all_input_nodes else noted


def update(fixed: tuple[Any, ...], numbers: Tensor, grad: Tensor, *flats: Any) -> None:
    """One step in the compute dtype; Inductor makes the copies part of the loop."""
    rule, constants, names, count = fixed
    hyper = {**constants, **dict(zip(names, numbers.unbind(), strict=True))}
    apply(rule, grad, flats[:count], Scratch(), hyper, flats[count:])
