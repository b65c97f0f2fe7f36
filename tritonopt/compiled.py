"""The sweep of `Optimizer.compile()`: Inductor fuses the eager rule to one loop over a flat span.

A graph takes one flat tensor per column, whatever the number of parameters, with dynamic sizes:
spans and large tensors of all sizes share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from tritonopt.eager import Scratch
from tritonopt.sweep import Sweep

LIVE = ("lr", "momentum", "step")
"""What changes from step to step: tensors of the graph. Other hyperparameters are its constants."""

_graphs: dict[Any, Callable[..., None]] = {}


class CompiledSweep(Sweep):
    def __init__(
        self,
        rule: Callable[..., None],
        params: Sequence[Tensor],
        columns: Sequence[Sequence[Tensor] | None],
        **kwargs: Any,
    ) -> None:
        super().__init__(rule, params, columns)
        self.kwargs = kwargs
        self._graph: Callable[..., None] | None = None

    def _piece(self, params: Sequence[Tensor]) -> int:
        return 2**62  # a fused loop needs no pieces that stay in cache

    def _update(self, flats: Sequence[Tensor | None], grad: Tensor, hyper: dict[str, Any]) -> None:
        if grad.numel() < 2:  # sizes 0 and 1 would each be a graph of their own
            return super()._update(flats, grad, hyper)
        hyper = {
            name: torch.tensor(float(value), dtype=torch.float64) if name in LIVE else value
            for name, value in hyper.items()
        }
        # Not as views: guards on what they are views of would tell spans from large tensors.
        bare = [flat if flat is None else flat.data for flat in flats]
        if self._graph is None:
            dtypes = [flat if flat is None else flat.dtype for flat in (*flats, grad)]
            self._graph = _graph(self.rule, dtypes, hyper, self.kwargs)
            with torch._dynamo.config.patch(specialize_float=True):  # here it is compiled
                self._graph(self.rule, self.dtype, bare, grad.data, hyper)
        else:
            self._graph(self.rule, self.dtype, bare, grad.data, hyper)


def _graph(
    rule: Callable[..., None], dtypes: list[Any], hyper: dict[str, Any], kwargs: dict[str, Any]
) -> Callable[..., None]:
    """A compiled update, shared by all optimizers of the same dtypes, constants and options.

    Each has a code object of its own: dynamo limits the graphs per code object, and would run
    what is beyond the limit without compiling it.
    """
    constants = tuple((k, v) for k, v in hyper.items() if not isinstance(v, Tensor))
    options = tuple(sorted((name, repr(value)) for name, value in kwargs.items()))
    key = (rule, tuple(dtypes), constants, options)
    if key not in _graphs:
        if kwargs.get("backend", "inductor") == "inductor":
            _trust_processor()
        function = FunctionType(update.__code__.replace(), globals(), update.__name__)
        _graphs[key] = torch.compile(function, **{"dynamic": True, **kwargs})
    return _graphs[key]


def _trust_processor() -> None:
    """Spares Inductor what torch knows: that it can use the processor's AVX instructions.

    Inductor would compile a program against torch's headers for each set of them: without its
    cache on disk that is 4 of the 10 s to the first step. Extensions of the sets it still tries.
    """
    from torch._inductor import config, cpu_vec_isa

    known = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if known and config.cpp.vec_isa_ok is None:
        with config.patch({"cpp.vec_isa_ok": True}):
            cpu_vec_isa.valid_vec_isa_list()  # remembered for the process


def update(
    rule: Callable[..., None],
    dtype: torch.dtype,
    flats: list[Tensor | None],
    grad: Tensor,
    hyper: dict[str, Any],
) -> None:
    """One step in the compute dtype; Inductor makes the copies part of the loop."""
    work = [None if flat is None else flat.to(dtype) for flat in flats]
    rule(work[0], grad.to(dtype), *work[1:], Scratch(), **hyper)
    for flat, computed in zip(flats, work, strict=True):
        if flat is not None and computed is not None and computed.dtype != flat.dtype:
            flat.copy_(computed)
