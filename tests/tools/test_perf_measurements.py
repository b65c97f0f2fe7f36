"""perf: what it counts, times and finds in memory is right."""

import itertools
import json
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from perf_cases import CPU, ROOT, eager

from perf import compile_time, memory, run, steps, timing
from perf.implementations import COMPILED, IMPLEMENTATIONS, Workload, beside_plain, start
from perf.workloads import WORKLOADS

EAGER = ("for-loop", "foreach", "tritonopt")

PUBLISHED = {  # tensors and elements, of torchvision, transformers and the papers
    "ResNet-50": (161, 25_557_032),
    "MobileNetV3-Large": (174, 5_483_032),
    "GPT-2 124M": (148, 124_439_808),
    "LSTM": (11, 19_780_400),
    "DQN": (10, 1_693_362),
    "1000 x 64": (1000, 64_000),
    "10000 x 16": (10_000, 160_000),
    "1 x 8M": (1, 8_388_608),
    "1 x 64M": (1, 67_108_864),
    "1 x 256M": (1, 268_435_456),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_the_published_networks(name):
    shapes = WORKLOADS[name]
    assert (len(shapes), sum(map(math.prod, shapes))) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("configuration", "dtype", "bytes_per_element"),
    [
        ("RMSprop", torch.float32, 20),
        ("Rprop", torch.float32, 28),
        ("RMSprop, centered, momentum", torch.float32, 36),
        ("Rprop", torch.bfloat16, 14),
    ],
)
def test_the_least_bytes(configuration, dtype, bytes_per_element):
    work = Workload(configuration, [(3, 5), (7,)], CPU, dtype)
    assert work.least_bytes == 22 * bytes_per_element


BESIDE_PLAIN = [
    (work, name) for work, names in beside_plain([(3, 5), (7,)], CPU) for name in names
    if name in COMPILED
]  # fmt: skip


@eager
@pytest.mark.parametrize(("work", "name"), BESIDE_PLAIN)
def test_the_bytes_of_options_are_those_that_are_described(work, name):
    optimizer = work.build(IMPLEMENTATIONS[name])
    optimizer.step()
    state, moved = work.bytes_of(IMPLEMENTATIONS[name])
    entries = [entry.items() for entry in optimizer.state.values()]
    few = "step", "square_avg_scale"
    assert sum(t.nbytes for entry in entries for key, t in entry if key not in few) == 22 * state
    inner = getattr(optimizer, "optimizer", optimizer)
    copied = 2 * (4 + 2) if name == "fp32 copies" else 0  # gradients out, results back
    assert inner.describe().splitlines()[1].split()[-1] == f"{22 * (moved - copied):,}"


def test_fp32_copies_are_what_the_split_master_is():
    work = Workload("Rprop, bf16", [(3, 5), (7,)], CPU, torch.bfloat16).with_gradients()
    found = []
    for name in ("fp32 copies", "master='split'"):
        torch.manual_seed(0)
        optimizer = work.build(IMPLEMENTATIONS[name])
        params = getattr(optimizer, "params", None) or optimizer.param_groups[0]["params"]
        for _ in range(3):
            optimizer.step()
        found.append([param.detach().clone() for param in params])
    assert all(map(torch.equal, *found))


def test_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = timing.interleaved(functions, CPU, seconds=0, rounds=4)
    rounds = ["".join(calls[n : n + 3]) for n in range(6, len(calls), 3)]
    assert "".join(calls[:6]) == "aabbcc"
    assert len(rounds) == 4 and len({*rounds}) > 1 and all({*round} == {*"abc"} for round in rounds)
    assert not any(one == next for one, next in itertools.pairwise(calls[6:]))
    assert [len(times[name].wall) for name in "abc"] == [4, 4, 4]
    assert times["a"].device == []


def test_device_time(monkeypatch):
    """The device spins for longer than the host queues, so that no gap is in between."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")

        def synchronize(self):
            done.append("synchronize")

        def elapsed_time(self, end):
            return 0.25

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", done.append)
    assert timing._device_time(lambda: done.append("step"), host_us=100) == 250
    assert done == [200 * timing.CYCLES_PER_US, "record", "step", "record", "synchronize"]


def test_medians_and_spread():
    summary = timing.Times(wall=[float(n) for n in range(101)]).summary()
    assert summary["wall_us"] == {"median": 50, "p10": 10, "p90": 90}
    assert summary["device_us"] is None


def test_what_fails_is_named(monkeypatch):
    broken = IMPLEMENTATIONS["foreach"]._replace(options={"lr": -1.0})
    monkeypatch.setitem(IMPLEMENTATIONS, "broken", broken)
    names = ("broken", "foreach", "tritonopt, replayed")
    found, missing = start(Workload("RMSprop", [(3,)], CPU), names)
    assert list(found) == ["foreach"]
    assert missing == {
        "broken": "ValueError: Invalid learning rate: -1.0", "tritonopt, replayed": "needs a GPU",
    }  # fmt: skip


def test_memory_of_a_call():
    def call():
        kept = torch.empty(1000)
        torch.empty(50_000)
        return kept

    assert memory.cpu_memory(call) == (4000, 204_000)


@pytest.mark.slow
@eager
def test_memory_of_optimizers():
    work = Workload("Rprop", [(50_000,)] * 3, CPU)
    stock, ours = (memory.memory(work, IMPLEMENTATIONS[n]) for n in ("foreach", "tritonopt"))
    assert stock["state_bytes"] == ours["state_bytes"] == 8 * 150_000 + 3 * 4
    assert stock["kept_bytes"] < 10_000
    assert stock["peak_bytes"] >= 4 * 150_000  # ours gathers gradients of small tensors
    assert ours["peak_bytes"] <= 4 * 150_000 + 1000


@pytest.mark.slow
@eager
def test_graphs_are_counted_in_a_fresh_process():
    work = Workload("RMSprop", [(64,)] * 2, CPU)
    (record,) = run.apart(partial(compile_time.records, "compile()", work), 200)
    assert record["graphs"] == 1 and record["first_step_s"] > 0


@eager
def test_records_of_steps(monkeypatch):
    monkeypatch.setattr(steps, "bandwidth", lambda *_: 1e10)
    work = Workload("Rprop", [(20, 3), (7,)], CPU)
    records = list(steps.records([("some", work)], [*EAGER, "foreach, replayed"], 0))
    assert [record["implementation"] for record in records] == [*EAGER, "foreach, replayed"]
    first, *_, last = records
    assert first["least_bytes"] == 67 * 28 and last["missing"] == "needs a GPU"
    floor = first["least_bytes"] / 1e10 * 1e6
    assert first["fraction_of_floor"] == pytest.approx(floor / first["wall_us"]["median"])


@eager
def test_what_bf16_learns():
    pytest.importorskip("sklearn")
    from perf import bf16

    training = bf16.Training("RMSprop", {"lr": 1e-5}, 20, 128)
    fp32, plain, _, rounding, split = bf16.records(training, CPU, range(2))
    assert fp32["dtype"] == "torch.float32" and plain["implementation"] == "tritonopt"
    assert len(fp32["losses"]) == 21 and fp32["losses"][0] == plain["losses"][0]
    assert fp32["loss"]["median"] == pytest.approx(fp32["losses"][-1])
    way = fp32["way"]["median"]
    assert plain["way"]["most"] < 0.8 * way
    assert split["way"]["median"] == pytest.approx(way, rel=0.1)
    assert rounding["loss"]["median"] < plain["loss"]["median"]


INTERPRETED = """
import torch
from perf import host, tune
host.COUNTS = 1, 3
cpu = torch.device("cpu")
launch = __import__("tritonopt.kernels.launch").kernels.launch
whole = launch.Launch.run
print(len(*host.records("Rprop", cpu)))
launch.Launch.run = whole
tune.SHAPES = [(3000,), (5,)]
for job in tune.plan(cpu, True)[:4]:
    print([(r["block"], r["threads"], r["wall_us"]["median"] > 0) for r in job.records()])
print(launch.BLOCK, launch.THREADS)
"""


@pytest.mark.slow
def test_host_and_grids_in_the_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, *grids, last = done.stdout.splitlines()
    assert first == "5" and last == "1024 128"
    assert grids == ["[(1024, 128, True), (2048, 256, True)]"] * 4


@pytest.mark.slow
@eager
@pytest.mark.skipif(torch.accelerator.is_available(), reason="tells what is missing without a GPU")
def test_benchmarks(tmp_path):
    """pytest-benchmark is given the times that were measured in turns."""
    pytest.importorskip("pytest_benchmark")
    file = tmp_path / "benchmarks.json"
    chosen = "DQN and Rprop and (loop or foreach or replayed)"
    command = [sys.executable, "-m", "pytest", "perf", "-k", chosen, f"--benchmark-json={file}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed, 2 skipped" in done.stdout, done.stdout
    for found in json.loads(file.read_text())["benchmarks"]:
        measured = found["extra_info"]["wall_us"]["median"] * 1e-6
        assert found["group"] == "Rprop, DQN"
        assert found["stats"]["median"] == pytest.approx(measured, rel=1e-6)
