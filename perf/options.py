"""What do options cost that need less memory, or keep more of bf16? `python -m perf.options`

Beside the plain optimizer of the same dtype, in turns: bytes of state, the least bytes that a step
moves, and its time, eager and after `compile()`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

import tritonopt
from perf import run
from perf.implementations import Step
from perf.timing import interleaved

SHAPES = {"1 x 8M": [(2**23,)], "1000 x 64": [(64,)] * 1000}
SEPARATE = "an fp32 copy beside it"  # by hand, as usual
HALF = {
    "plain": {},
    "state_dtype": {"state_dtype": torch.float32},
    "stochastic_rounding": {"stochastic_rounding": True},
    'master="split"': {"master": "split"},
    SEPARATE: {},
}
CHOICES: dict[tuple[str, torch.dtype], dict[str, dict[str, Any]]] = {
    ("RMSprop", torch.float32): {"plain": {}, "quantized": {"quantized": True}},
    ("Rprop", torch.float32): {"plain": {}, "compact": {"compact": True}},
    ("RMSprop", torch.bfloat16): HALF,
    ("Rprop", torch.bfloat16): HALF,
}


class Started(NamedTuple):
    step: Step
    state: float  # bytes of an element
    moved: float


def started(
    make: Callable[..., Any], shapes: list[Any], dtype: torch.dtype, option: str, options: Any
) -> Started:
    params = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    numel = sum(param.numel() for param in params)
    copies, step = params, None
    if option == SEPARATE:
        copies = [param.detach().float().requires_grad_() for param in params]
        for copy in copies:
            copy.grad = torch.empty_like(copy)
    optimizer = make(copies, **options)

    @torch.no_grad()
    def by_hand() -> None:
        torch._foreach_copy_([copy.grad for copy in copies], [param.grad for param in params])
        optimizer.step()
        torch._foreach_copy_(params, copies)

    step = by_hand if option == SEPARATE else optimizer.step
    step()
    entries = optimizer.state.values()
    state = sum(value.nbytes for entry in entries for value in entry.values() if value.dim())
    state, half = state / numel, dtype.itemsize
    if option == SEPARATE:  # gradient, copy and state; then the parameter is written alone
        return Started(step, state + 4, half + 8 + 2 * state + half)
    return Started(step, state, 3 * half + 2 * state)


def records(rule: str, dtype: torch.dtype, label: str, seconds: float) -> Iterator[dict[str, Any]]:
    shapes, found = SHAPES[label], {}
    for option, options in CHOICES[rule, dtype].items():
        for how in ("tritonopt", "compile()"):
            make = partial(getattr(tritonopt, rule), compile=how == "compile()")
            found[option, how] = started(make, shapes, dtype, option, options)
    steps = {f"{option}|{how}": one.step for (option, how), one in found.items()}
    times = interleaved(steps, torch.device("cpu"), seconds)
    for (option, how), one in found.items():
        yield {
            "optimizer": rule, "workload": label, "dtype": str(dtype).removeprefix("torch."),
            "option": option, "implementation": how, "state_bytes": one.state,
            "moved_bytes": one.moved, **times[f"{option}|{how}"].summary(),
        }  # fmt: skip


def plan(device: torch.device, quick: bool) -> list[run.Job]:
    if device.type != "cpu":
        return []
    chosen = [("RMSprop", torch.float32, "1000 x 64")] if quick else [
        (*key, label) for label in SHAPES for key in CHOICES
    ]  # fmt: skip
    return [
        run.Job(
            "options", f"{rule}, {str(dtype).removeprefix('torch.')}, {label}",
            partial(records, rule, dtype, label, 0.3 if quick else 2.0), seconds=120,
        )
        for rule, dtype, label in chosen
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(run.command(plan, seconds=300))
