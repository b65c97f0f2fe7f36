"""Rprop's first step: step sizes, made before it, start from the lr that is then in force."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tritonopt import slab
from tritonopt.device import is_capturing
from tritonopt.eligible import is_plain
from tritonopt.layout import Layout
from tritonopt.packing import is_unused
from tritonopt.shard import local


class FirstStep:
    """What is left to do for the parameters of a layout that have not taken theirs.

    `unused` step sizes, each with its parameter and its value, start from the lr of the first step.
    Of `perhaps`, the first step was taken, with `lr`, or skipped because a gradient was infinite:
    the device knows.
    """

    def __init__(self, layout: Layout, made_with: Iterable[float]) -> None:
        """`made_with`: the lr that step sizes may have been made with."""
        self.unused = unused(layout.params, layout.states, made_with)
        self.perhaps: list[tuple[Tensor, float]] = []
        self.lr: Any = None

    def settle(self, lr: Any, state: Mapping[Tensor, Any]) -> bool:
        """Gives step sizes the dtype that torch does, the first gradient's; whether any changed."""
        found = [self._settle(param, lr, state.get(param, {})) for param, _ in self.unused]
        return any(found)

    def _settle(self, param: Tensor, lr: Any, entry: dict[str, Any]) -> bool:
        if param.grad is None or "step_size" not in entry:
            return False
        made = local(entry["step_size"])
        if local(param.grad).dtype == made.dtype or slab.find(made) is None:
            return False
        entry["step_size"] = torch.full_like(param.grad, float(lr))
        return True

    def begin(self, lr: Any, state: Mapping[Tensor, Any], may_be_skipped: bool) -> bool:
        """Called before each update: step sizes of parameters that have a gradient become `lr`.

        `may_be_skipped`: by the device, without the host's knowing. Returns whether any became it.
        """
        waiting = self.unused + self._skipped(lr, state)
        self.unused = []
        changed = False
        for param, value in waiting:
            if param.grad is None:
                self.unused.append((param, value))
                continue
            entry = state.get(param, {})
            if "step_size" not in entry:  # taken away: torch makes it again
                continue
            step_size = local(entry["step_size"])
            if isinstance(lr, Tensor) and not lr.is_cpu and is_capturing(param.device):
                raise RuntimeError(
                    "step sizes start from lr: take the first step before a graph captures one"
                )
            start = rounded(float(lr), step_size.dtype)
            if start != value:
                if is_capturing(param.device):
                    raise RuntimeError(
                        "lr changed before the first step: take one step before a graph captures it"
                    )
                if not is_as_made(entry):  # written to since: a checkpoint, loaded in place
                    continue
                step_size.fill_(start)
                changed = True
            if may_be_skipped:
                self.perhaps.append((param, start))
                self.lr = lr
        return changed

    def _skipped(self, lr: Any, state: Mapping[Tensor, Any]) -> list[tuple[Tensor, float]]:
        """Those whose step was skipped, as far as it matters.

        It does not while a float lr is the same, nor in a graph, which takes them as they are.
        Otherwise the host waits for the answer, and once it is no, never again.
        """
        same = not isinstance(lr, Tensor) and lr == self.lr
        if not self.perhaps or same or is_capturing(self.perhaps[0][0].device):
            return []
        asked, self.perhaps = self.perhaps, []
        return [entry for entry in asked if float(state[entry[0]]["step"]) == 0]


def unused(
    params: Iterable[Tensor], entries: Iterable[dict[str, Any] | None], made_with: Iterable[float]
) -> list[tuple[Tensor, float]]:
    """Parameters with step sizes that were made with one of these lrs and not used, and these."""
    return [
        (param, float(local(entry["step_size"]).flatten()[0]))
        for param, entry in zip(params, entries, strict=True)
        if entry
        and "step_size" in entry
        and is_plain(local(entry["step_size"]))
        and not param.is_complex()
        and local(param).numel()
        and is_as_made(entry)
        and is_made_with(made_with, local(entry["step_size"]))
    ]


def is_as_made(entry: dict[str, Any]) -> bool:
    """Whether no step has used the state, and its step sizes are still all the same."""
    if not entry.keys() >= {"prev", "step_size"} or not is_unused(entry):
        return False
    step_size, prev = local(entry["step_size"]), local(entry["prev"])
    if not step_size.numel():
        return True
    low, high = torch.aminmax(step_size)
    return bool(low == high) and not bool(prev.any())


def is_made_with(lrs: Iterable[float], step_size: Tensor) -> bool:
    """Whether step sizes, which are all the same, have the value of one of these, or none."""
    if not step_size.numel():
        return True
    value = float(step_size.flatten()[0])
    return value in [rounded(lr, step_size.dtype) for lr in lrs]


@lru_cache(256)
def rounded(value: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=dtype, device="cpu"))
