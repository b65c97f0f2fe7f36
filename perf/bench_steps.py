"""What does a step cost? `pytest perf` prints pytest-benchmark's tables, one per workload.

All implementations of a table are measured in turns, in a process of their own; pytest-benchmark,
which runs one benchmark after the other, is given the times that were measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import pytest
import torch

from perf.implementations import RULES, Missing, Workload
from perf.machine import accelerator
from perf.run import apart
from perf.steps import ALL, CHOSEN, EAGER, Measured, figures, measure
from perf.workloads import WORKLOADS

DEVICE = accelerator() or torch.device("cpu")


class Replay:
    """A timer that says how long each call took that was measured before."""

    now = 0.0
    seconds: Iterator[float] = iter(())

    def __call__(self) -> float:
        self.now += next(self.seconds, 0.0)
        return self.now


replay = Replay()


def records(*arguments: Any) -> Iterator[Measured]:
    yield measure(*arguments)


@lru_cache(maxsize=1)  # the implementations of one table come one after the other
def measured(workload: Workload, names: tuple[str, ...]) -> Measured:
    try:
        (found,) = apart(partial(records, workload, names, 2.0), seconds=600)
        return found
    except Missing as why:
        return Measured({}, dict.fromkeys(names, str(why)), 0.0)


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("implementation", dict.fromkeys([*ALL, *EAGER]))
@pytest.mark.parametrize("optimizer", RULES)
@pytest.mark.parametrize("workload", CHOSEN)
def test_step(
    benchmark: Any, request: Any, workload: str, optimizer: str, implementation: str
) -> None:
    chosen = [item.callspec.params for item in request.session.items]
    names = [p["implementation"] for p in chosen
             if (p["workload"], p["optimizer"]) == (workload, optimizer)]  # fmt: skip
    work = Workload(optimizer, tuple(WORKLOADS[workload]), DEVICE)
    found = measured(work, tuple(names))
    if implementation in found.missing:
        pytest.skip(found.missing[implementation])
    benchmark.group = f"{optimizer}, {workload}"
    benchmark.extra_info.update(figures(work, found, implementation), torch=torch.__version__)
    wall = found.times[implementation].wall
    replay.seconds = iter([seconds for us in wall for seconds in (0.0, us * 1e-6)])
    benchmark.pedantic(lambda: None, rounds=len(wall))
