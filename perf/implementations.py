"""What is measured: optimizers, and the ways to run their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod
from operator import attrgetter
from typing import Any, NamedTuple

import torch

import tritonopt
from perf.workloads import Shape

CPU = torch.device("cpu")
Step = Callable[[], Any]

RULES = ("RMSprop", "Rprop")
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "RMSprop": ("RMSprop", {}),
    "Rprop": ("Rprop", {}),
    "RMSprop, centered, momentum": ("RMSprop", {"centered": True, "momentum": 0.9}),
}


class Missing(Exception):
    """Why something cannot be measured."""


def reason(error: Exception) -> str:
    """In one line."""
    text = str(error) if isinstance(error, Missing) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0]


class Workload(NamedTuple):
    configuration: str
    shapes: Sequence[Shape]
    device: torch.device
    dtype: torch.dtype = torch.float32
    grads: Sequence[torch.Tensor] = ()  # of all implementations, as none writes to them

    def with_gradients(self) -> Workload:
        make = partial(torch.randn, dtype=self.dtype, device=self.device)
        return self._replace(grads=[make(shape) for shape in self.shapes])

    @property
    def elements(self) -> int:
        return sum(map(prod, self.shapes))

    @property
    def least_bytes(self) -> int:
        """What any step must move: parameter and state read and written, the gradient read."""
        optimizer = self._replace(shapes=[(1,)], device=CPU, grads=()).build(FOR_LOOP)
        optimizer.step()
        (state,) = optimizer.state.values()
        states = [state[key] for key in state if key != "step"]
        return self.elements * (3 * self.dtype.itemsize + 2 * sum(t.itemsize for t in states))

    def build(self, implementation: Implementation) -> Any:
        """An optimizer over parameters of its own, which have gradients."""
        name, options = CONFIGURATIONS[self.configuration]
        params = []
        for index, shape in enumerate(self.shapes):
            param = torch.nn.Parameter(torch.randn(shape, dtype=self.dtype, device=self.device))
            param.grad = self.grads[index] if self.grads else torch.randn_like(param)
            params.append(param)
        make = getattr(implementation.library, name)
        return make(params, **options, **implementation.options)


def _compiled_method(optimizer: Any) -> Step:
    optimizer.compile()
    return optimizer.step  # type: ignore[no-any-return]


def _replayed(optimizer: Any) -> Step:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()

    def replay(owner: Any = optimizer) -> None:  # of the memory that the graph knows
        graph.replay()

    return replay


class Implementation(NamedTuple):
    library: Any
    start: Callable[[Any], Step] = attrgetter("step")  # from the optimizer to what takes a step
    options: dict[str, Any] = {}
    needs_gpu: bool = False
    compiles_stock: bool = False  # which takes minutes for some hundred parameters


FOR_LOOP = Implementation(torch.optim, options={"foreach": False})
IMPLEMENTATIONS = {
    "for-loop": FOR_LOOP,
    "foreach": Implementation(torch.optim, options={"foreach": True}),
    "compiled": Implementation(torch.optim, lambda o: torch.compile(o.step), compiles_stock=True),
    "tritonopt": Implementation(tritonopt),
    "compile()": Implementation(tritonopt, _compiled_method),
    "backend": Implementation(
        torch.optim, lambda o: torch.compile(o.step, backend="tritonopt"), compiles_stock=True
    ),
    "foreach, replayed": Implementation(
        torch.optim, _replayed, {"capturable": True, "foreach": True}, needs_gpu=True
    ),
    "tritonopt, replayed": Implementation(
        tritonopt, _replayed, {"capturable": True}, needs_gpu=True
    ),
}


def start(workload: Workload, names: Iterable[str]) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps of the implementations, and why others are missing.

    Stock optimizers are compiled last: a compiler leaves a heap in pieces, in which the objects of
    what is built after it lie far from each other, and 1000 tensors take up to three times as long.
    """
    steps, missing = {}, {}
    for name in sorted(names, key=lambda name: IMPLEMENTATIONS[name].compiles_stock):
        implementation = IMPLEMENTATIONS[name]
        try:
            if implementation.needs_gpu and workload.device.type != "cuda":
                raise Missing("needs a GPU")
            step = implementation.start(workload.build(implementation))
            step()
            steps[name] = step
        except Exception as error:
            missing[name] = reason(error)
    return steps, missing
