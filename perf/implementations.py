"""What is measured: optimizers, and the ways to run their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import prod
from operator import attrgetter
from types import SimpleNamespace
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
    "RMSprop, momentum": ("RMSprop", {"momentum": 0.9}),
    "RMSprop, centered": ("RMSprop", {"centered": True}),
    "RMSprop, bf16": ("RMSprop", {}),
    "Rprop, bf16": ("Rprop", {}),
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

    def bytes_of(self, implementation: Implementation) -> tuple[int, int]:
        """An element's state, and what a step must move of it: parameter and state are read and
        written, the gradient is read."""
        optimizer = self._replace(shapes=[(1,)], device=CPU, grads=()).build(implementation)
        optimizer.step()
        (entry,) = optimizer.state.values()
        few = "step", "square_avg_scale"  # which is of 256 elements
        state = sum(entry[key].itemsize for key in entry if key not in few)
        moved = 3 * self.dtype.itemsize + 2 * state
        return state, moved + getattr(optimizer, "moves_more", 0)

    @property
    def least_bytes(self) -> int:
        """What any step must move."""
        return self.elements * self.bytes_of(FOR_LOOP)[1]

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


class ByHand:
    """An optimizer of fp32 copies: gradients are copied to them, and results from them."""

    moves_more = 10  # gradients in fp32, out and in; copies in again; parameters are not read

    def __init__(self, make: Any, params: list[Any], **options: Any) -> None:
        self.params = params
        self.copies = [torch.nn.Parameter(param.detach().float()) for param in params]
        for copy in self.copies:
            copy.grad = torch.empty_like(copy)  # kept: to allocate it at each step takes longer
        self.optimizer = make(self.copies, **options)
        self.compile = self.optimizer.compile

    @torch.no_grad()
    def step(self) -> None:
        torch._foreach_copy_([c.grad for c in self.copies], [p.grad for p in self.params])
        self.optimizer.step()
        torch._foreach_copy_(self.params, self.copies)

    @property
    def state(self) -> dict[Any, Any]:
        return {copy: {**self.optimizer.state[copy], "copy": copy} for copy in self.copies}


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

BY_HAND = SimpleNamespace(
    RMSprop=partial(ByHand, tritonopt.RMSprop), Rprop=partial(ByHand, tritonopt.Rprop)
)
OPTIONS = {  # of tritonopt's optimizers, and what "fp32 copies" does without one
    f"{name}={value!r}": Implementation(tritonopt, options={name: value})
    for name, value in (
        ("compact", True), ("quantized", True), ("cautious", True), ("nan_safe", True),
        ("state_dtype", torch.float32),
        ("stochastic_rounding", True), ("master", "split"),
    )
} | {"fp32 copies": Implementation(BY_HAND)}  # fmt: skip
COMPILED = {"tritonopt": "compile()", **{name: f"{name}, compile()" for name in OPTIONS}}
for _name, _option in OPTIONS.items():
    IMPLEMENTATIONS[_name] = _option
    IMPLEMENTATIONS[COMPILED[_name]] = _option._replace(start=_compiled_method)
_COMPACT, _QUANTIZED, _CAUTIOUS, _NAN_SAFE, *_OF_BF16 = OPTIONS
BESIDE_PLAIN: dict[str, tuple[torch.dtype, list[str]]] = {  # by configuration
    "RMSprop": (torch.float32, [_QUANTIZED]),
    "Rprop": (torch.float32, [_COMPACT]),
    "RMSprop, momentum": (torch.float32, [_CAUTIOUS]),
    "RMSprop, centered": (torch.float32, [_NAN_SAFE]),
    "RMSprop, bf16": (torch.bfloat16, _OF_BF16),
    "Rprop, bf16": (torch.bfloat16, _OF_BF16),
}


def beside_plain(
    shapes: Sequence[Shape], device: torch.device
) -> Iterator[tuple[Workload, list[str]]]:
    """Workloads, and what takes turns in each; on a GPU, compile() changes nothing."""
    for configuration, (dtype, some) in BESIDE_PLAIN.items():
        names = ["tritonopt", *some]
        if device.type == "cpu":
            names += [COMPILED[name] for name in names]
        yield Workload(configuration, shapes, device, dtype), names


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
