"""What is measured: optimizers, and the ways to run their steps."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from perf.workloads import Shape
from tritonopt.compile.backend import tritonopt as backend

Step = Callable[[], Any]

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "RMSprop": ("RMSprop", {}),
    "Rprop": ("Rprop", {}),
    "RMSprop, centered, momentum": ("RMSprop", {"centered": True, "momentum": 0.9}),
}

COMPILED_UP_TO = {"compiled": 1000, "backend": 1000}
"""Parameters. To compile the stock optimizer over so many takes up to five minutes."""


class Missing(Exception):
    """Why an implementation cannot be measured."""


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
        """What any step must move: the library's own count."""
        one = self._replace(shapes=[(1,)], device=torch.device("cpu"), grads=())
        (bucket,) = one.build(IMPLEMENTATIONS["tritonopt"])._layouts[0].buckets
        return self.elements * bucket.bytes_per_element

    def build(self, implementation: Implementation) -> Any:
        """An optimizer over parameters of its own, which have gradients."""
        library = implementation.library
        name, options = CONFIGURATIONS[self.configuration]
        try:
            cls = getattr(importlib.import_module(library), name)
        except ImportError as error:
            raise Missing(f"{library.split('.')[0]} is not installed") from error
        except AttributeError as error:
            raise Missing(f"{library.split('.')[0]} has no {name}") from error
        params = []
        for index, shape in enumerate(self.shapes):
            param = torch.nn.Parameter(torch.randn(shape, dtype=self.dtype, device=self.device))
            param.grad = self.grads[index] if self.grads else torch.randn_like(param)
            params.append(param)
        return cls(params, **options, **implementation.options)


class Implementation(NamedTuple):
    library: str
    start: Callable[[Any], Step]  # from the optimizer to what takes a step
    options: dict[str, Any] = {}
    needs_gpu: bool = False

    def step(self, workload: Workload) -> Step:
        if self.needs_gpu and workload.device.type != "cuda":
            raise Missing("needs a GPU")
        return self.start(workload.build(self))


def _eager(optimizer: Optimizer) -> Step:
    return optimizer.step


def _traced(optimizer: Optimizer) -> Step:
    return torch.compile(optimizer.step)


def _compile(optimizer: Any) -> Step:
    optimizer.compile()
    return optimizer.step  # type: ignore[no-any-return]


def _backend(optimizer: Optimizer) -> Step:
    return torch.compile(optimizer.step, backend=backend)


def _replayed(optimizer: Optimizer) -> Step:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()

    def replay(owner: Optimizer = optimizer) -> None:  # of the memory that the graph knows
        graph.replay()

    return replay


IMPLEMENTATIONS = {
    "for-loop": Implementation("torch.optim", _eager, {"foreach": False}),
    "foreach": Implementation("torch.optim", _eager, {"foreach": True}),
    "compiled": Implementation("torch.optim", _traced),
    "tritonopt": Implementation("tritonopt", _eager),
    "compile()": Implementation("tritonopt", _compile),
    "backend": Implementation("torch.optim", _backend),
    "foreach, replayed": Implementation(
        "torch.optim", _replayed, {"capturable": True, "foreach": True}, needs_gpu=True
    ),
    "tritonopt, replayed": Implementation(
        "tritonopt", _replayed, {"capturable": True}, needs_gpu=True
    ),
    "bitsandbytes": Implementation(
        "bitsandbytes.optim", _eager, {"optim_bits": 32}, needs_gpu=True
    ),
}
TRACED = Implementation("tritonopt", _traced)


def start(
    workload: Workload, names: Sequence[str], up_to: dict[str, int]
) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps of the implementations, and why others are missing.

    What a compiler traces comes last: it leaves a heap in pieces, in which the objects of what is
    built after it lie far from each other, and 1000 tensors take up to three times as long.
    """
    steps, missing = {}, {}
    for name in sorted(names, key=COMPILED_UP_TO.__contains__):
        limit = up_to.get(name, len(workload.shapes))
        try:
            if len(workload.shapes) > limit:
                raise Missing(f"not compiled for over {limit} parameters (see --compiled-up-to)")
            steps[name] = IMPLEMENTATIONS[name].step(workload)
            steps[name]()
        except Missing as why:
            missing[name] = str(why)
        except Exception as error:
            steps.pop(name, None)
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return steps, missing
