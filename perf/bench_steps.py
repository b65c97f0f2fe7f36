"""What does a step cost? `pytest perf` prints pytest-benchmark's tables, one per workload.

All implementations of a table are measured in turns, in a process of their own; pytest-benchmark,
which runs one benchmark after the other, is given the times that were measured. The floor, and why
anything was not measured, stand at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import pytest
import torch

from perf.child import apart
from perf.implementations import COMPILED_UP_TO, IMPLEMENTATIONS, Missing, Workload
from perf.steps import TOLD, Measured, figures, measure
from perf.workloads import CURVE, WORKLOADS


class Replay:
    """A timer that says how long each call took that was measured before."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seconds: list[float] = []

    def play(self, microseconds: list[float]) -> None:
        self.seconds = [s for us in reversed(microseconds) for s in (us * 1e-6, 0.0)]

    def __call__(self) -> float:
        self.now += self.seconds.pop() if self.seconds else 0.0
        return self.now


replay = Replay()


def measure_alone(*arguments: Any) -> Iterator[Measured]:
    yield measure(*arguments)


@lru_cache(maxsize=1)  # the implementations of one table come one after the other
def measured(
    workload: Workload, names: tuple[str, ...], up_to: int | None, seconds: float
) -> Measured:
    limits = COMPILED_UP_TO if up_to is None else dict.fromkeys(COMPILED_UP_TO, up_to)
    try:
        (found,) = apart(partial(measure_alone, workload, names, limits, seconds))
        return found
    except Missing as why:
        return Measured({}, dict.fromkeys(names, str(why)), 0.0)


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("optimizer", ["RMSprop", "Rprop"])
def test_step(
    benchmark: Any, request: Any, workload: str, optimizer: str, implementation: str
) -> None:
    option = request.config.getoption
    chosen = [
        item.callspec.params["implementation"]
        for item in request.session.items
        if item.callspec.params["workload"] == workload
        and item.callspec.params["optimizer"] == optimizer
    ]
    work = Workload(optimizer, tuple({**WORKLOADS, **CURVE}[workload]), option("device"))
    quick, up_to = option("quick"), option("compiled_up_to")
    record = {"optimizer": optimizer, "workload": workload, "implementation": implementation}
    found = measured(
        work, tuple(chosen), 0 if quick and up_to is None else up_to, 0.3 if quick else 2.0
    )
    if implementation in found.missing:
        TOLD.append({**record, "missing": found.missing[implementation]})
        pytest.skip(found.missing[implementation])
    record |= figures(work, found, implementation)
    TOLD.append(record)
    benchmark.group = f"{optimizer}, {workload}"
    benchmark.extra_info.update(record, torch=torch.__version__)
    wall = found.times[implementation].wall
    replay.play(wall)
    benchmark.pedantic(lambda: None, rounds=len(wall))
