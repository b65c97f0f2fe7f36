"""What does a step cost? `pytest perf` prints pytest-benchmark's tables, one per workload.

All implementations of a table are measured in turns; pytest-benchmark, which runs one benchmark
after the other, is given the times that were measured.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from perf.implementations import COMPILED_UP_TO, IMPLEMENTATIONS, Workload
from perf.steps import figures, measure
from perf.timing import Times, bandwidth
from perf.workloads import WORKLOADS


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


@pytest.fixture(scope="session")
def floor(request: pytest.FixtureRequest) -> float:
    quick = request.config.getoption("quick")
    return bandwidth(request.config.getoption("device"), 2**24 if quick else 2**26)


@lru_cache(maxsize=1)  # the implementations of one table come one after the other
def measured(
    workload: Workload, names: tuple[str, ...], up_to: int | None, seconds: float
) -> tuple[dict[str, Times], dict[str, str]]:
    limits = COMPILED_UP_TO if up_to is None else dict.fromkeys(COMPILED_UP_TO, up_to)
    return measure(workload, names, limits, seconds)


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("optimizer", ["RMSprop", "Rprop"])
def test_step(
    benchmark: Any, request: Any, floor: float, workload: str, optimizer: str, implementation: str
) -> None:
    option = request.config.getoption
    chosen = [
        item.callspec.params["implementation"]
        for item in request.session.items
        if item.callspec.params["workload"] == workload
        and item.callspec.params["optimizer"] == optimizer
    ]
    work = Workload(optimizer, tuple(WORKLOADS[workload]), option("device"))
    quick, up_to = option("quick"), option("compiled_up_to")
    times, missing = measured(
        work, tuple(chosen), 0 if quick and up_to is None else up_to, 0.3 if quick else 4.0
    )
    if implementation in missing:
        pytest.skip(missing[implementation])
    benchmark.group = f"{optimizer}, {workload}"
    benchmark.extra_info.update(figures(work, times[implementation], floor))
    benchmark.extra_info["torch"] = torch.__version__
    replay.play(times[implementation].wall)
    benchmark.pedantic(lambda: None, rounds=len(times[implementation].wall))
