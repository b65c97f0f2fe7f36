"""perf: its counts are right, its parts end in time."""

import argparse
import itertools
import json
import math
import os
import runpy
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch

from tritonopt.device import INTERPRET

ROOT = Path(__file__).parents[2]
perf = sys.modules.setdefault("perf", types.ModuleType("perf"))
perf.__path__ = [str(ROOT / "perf")]  # ROOT in sys.path would hide Hugging Face's `kernels`

from perf import (
    child,
    compile_time,
    machine,
    memory,
    plan,
    run,
    steps,
    timing,
    tune,
    variants,
)
from perf.implementations import IMPLEMENTATIONS, Missing, Workload, start
from perf.workloads import WORKLOADS

CPU = torch.device("cpu")
EAGER = ("for-loop", "foreach", "tritonopt")
eager = pytest.mark.skipif(INTERPRET, reason="measures the eager path")

PUBLISHED = {  # tensors and elements, of torchvision, transformers and the papers
    "ResNet-50": (161, 25_557_032),
    "EfficientNet-B0": (213, 5_288_548),
    "MobileNetV3-Large": (174, 5_483_032),
    "GPT-2 124M": (148, 124_439_808),
    "LSTM": (11, 19_780_400),
    "IMPALA": (45, 1_629_290),
    "DQN": (10, 1_693_362),
    "PINN": (18, 3_021),
    "1000 x 64": (1000, 64_000),
    "10000 x 16": (10_000, 160_000),
    "1 x 64M": (1, 67_108_864),
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


def test_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = timing.interleaved(functions, CPU, seconds=0, rounds=4)
    rounds = ["".join(calls[n : n + 3]) for n in range(9, len(calls), 3)]
    assert "".join(calls[:9]) == "aaabbbccc"
    assert len(rounds) == 4 and len({*rounds}) > 1 and all({*round} == {*"abc"} for round in rounds)
    assert not any(one == next for one, next in itertools.pairwise(calls[9:]))
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


def test_a_missing_peer_is_named(monkeypatch):
    peer = IMPLEMENTATIONS["bitsandbytes"]._replace(library="no_such_peer.optim", needs_gpu=False)
    monkeypatch.setitem(IMPLEMENTATIONS, "peer", peer)
    names = ("foreach", "peer", "compiled", "tritonopt, replayed")
    found, missing = start(Workload("RMSprop", [(3,)] * 5, CPU), names, {"compiled": 4})
    assert list(found) == ["foreach"]
    assert missing["peer"] == "no_such_peer is not installed"
    assert "over 4 parameters" in missing["compiled"]
    assert missing["tritonopt, replayed"] == "needs a GPU"


def test_workloads_that_do_not_fit_are_left_out(monkeypatch):
    monkeypatch.setattr(steps, "free_memory", lambda device: 1000)
    with pytest.raises(Missing, match="free memory"):
        steps.measure(Workload("RMSprop", [(1000,)], CPU), EAGER, {}, 0)


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


def job(text):
    """What a spawned process can be given by this file, which it does not import."""
    return partial(eval, text, {})


@pytest.mark.slow
def test_parts_end_in_time_and_keep_what_they_found(tmp_path, monkeypatch):
    """The clock strikes when the first record is there, while the job waits for ever."""
    results = {}
    forever = job("(__import__('threading').Event().wait() if n else {'found': 1} for n in (0, 1))")
    for module in (run, child):
        monkeypatch.setattr(module, "monotonic", lambda: 1e6 if results["late"] else 0.0)
    parts = {
        "late": run.Part({"first": forever, "second": forever}, seconds=1000),
        "broken": run.Part({"job": job("1 / 0"), "next": job("[{'found': 2}]")}),
    }
    run.run(parts, results, tmp_path / "folder" / "results.json")
    late = "the 1000 s of this part were over"
    assert results["late"] == [
        {"found": 1}, {"job": "first", "missing": late}, {"job": "second", "missing": late},
    ]  # fmt: skip
    assert results["broken"] == [
        {"job": "job", "missing": "ZeroDivisionError: division by zero"}, {"found": 2},
    ]  # fmt: skip
    assert json.loads((tmp_path / "folder" / "results.json").read_text()) == results


@pytest.mark.slow
def test_jobs_in_processes_of_their_own():
    process = job("[{'process': __import__('os').getpid()}]")
    jobs = {"one": process, "broken": job("1 / 0"), "gone": job("__import__('os')._exit(3)"),
            "two": process}  # fmt: skip
    results = {}
    run.run({"apart": run.Part(jobs, apart=True), "same": run.Part(jobs, seconds=1000)}, results)
    for first, broken, gone, second in results.values():
        assert broken == {"job": "broken", "missing": "ZeroDivisionError: division by zero"}
        assert gone == {"job": "gone", "missing": "the process ended with exit code 3"}
        assert os.getpid() != first["process"] != second["process"] != os.getpid()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="looks at it through a named pipe")
def test_a_process_that_is_ended_takes_along_what_it_started(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code = f"import time; p = open({str(pipe)!r}, 'w', 1); print(1, file=p)\n"
    code += "time.sleep(100); print(2, file=p)"
    start = f"__import__('subprocess').run([{sys.executable!r}, '-c', {code!r}])"
    with child.Child() as process:
        found = process(job(f"({start} if n else n for n in (0, 1))"))
        assert next(found) == 0
        reader = pipe.open()  # waits for who writes
        assert reader.readline() == "1\n"
    with reader:
        assert reader.read() == ""  # nobody will write any more


@pytest.mark.slow
def test_progress(capsys):
    run.run({"part": run.Part({"one": list, "two": list})}, {})
    assert capsys.readouterr().out == "part 1/2: one\npart 2/2: two\n"


@pytest.mark.slow
@eager
def test_graphs_are_counted_in_a_fresh_process():
    (record,) = compile_time.records("compile()", Workload("RMSprop", [(64,)] * 2, CPU), 200)
    assert record["graphs"] == 1 and record["first_step_s"] > 0


def test_what_is_not_compiled_in_time_is_told():
    (record,) = compile_time.records("compile()", Workload("RMSprop", [(64,)] * 2, CPU), 0)
    assert record == {"implementation": "compile()", "optimizer": "RMSprop", "tensors": 2,
                      "missing": "not compiled after 0 s"}  # fmt: skip


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["perf.gpu"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("perf.gpu", run_name="__main__")
    assert end.value.code == 2 and "needs a GPU" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["meta", "no"])
def test_devices_that_cannot_be_measured(name):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{name}' is no"):
        machine.usable_device(name)


def test_an_interrupted_run_keeps_what_it_found(tmp_path, monkeypatch, capsys):
    def interrupt():
        yield {"optimizer": "RMSprop", "us_of_1": 1.0, "us_of_1000": 2.0,
               "us_per_further_parameter": 0.1, "us_of_1000_after_backward": 3.0}  # fmt: skip
        raise KeyboardInterrupt

    jobs = {"one": interrupt, "two": interrupt}
    monkeypatch.setattr(plan.host, "jobs", lambda *_: jobs)
    assert plan.main(CPU, False, options(False, "--only", "host", "--out", str(tmp_path))) == 130
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())["host"]
    assert file.name == "cpu.json.partial" and found[0]["us_of_1"] == 1
    assert [record["job"] for record in found[1:]] == ["one", "two"]
    assert "Interrupted" in capsys.readouterr().out


@pytest.mark.parametrize("names", [["bitsandbytes"], ["compile()", "foreach, replayed"]], ids=str)
def test_what_is_asked_for_is_measured_or_said_to_be_missing(names):
    arguments = ["--quick", "--only", "steps", "--implementations", *names]
    (part,) = plan.plan(CPU, False, plan.parser(None, False).parse_args(arguments)).values()
    job = part.jobs["RMSprop, PINN"]
    assert job.args[2] == names and job.keywords["up_to"]["compiled"]


def options(gpu, *arguments):
    return plan.parser(None, gpu).parse_args([*arguments, "--implementations", *EAGER])


def test_what_is_named_takes_as_long_as_it_takes():
    parser = plan.parser(None, gpu=True)
    whole, quick = (plan.plan(CPU, True, parser.parse_args(a)) for a in ([], ["--quick"]))
    assert sum(part.seconds for part in whole.values()) < 8 * 60
    assert sum(part.seconds for part in quick.values()) < 2 * 60
    for arguments, limited in ([], False), (["--quick"], True):
        parts = plan.plan(CPU, True, options(True, *arguments)).values()
        assert {part.seconds is not None for part in parts} == {limited}


@eager
@pytest.mark.slow
@pytest.mark.parametrize("gpu", [False, True])
def test_everything_on_a_cpu(gpu, tmp_path, monkeypatch, capsys):
    """The GPU's plan, too, of which only the sweep over grids finds nothing to measure."""
    unlimited = dict.fromkeys(plan.QUICKLY.limits)  # so that it runs in this process
    monkeypatch.setattr(plan, "QUICKLY", plan.QUICKLY._replace(seconds=0, limits=unlimited))
    monkeypatch.setattr(plan, "QUICK", ("PINN",))
    monkeypatch.setattr(plan, "SIZES", [2**8])
    monkeypatch.setattr(plan, "COUNTS", (1, 3))
    monkeypatch.setattr(tune, "DTYPES", {"fp32": torch.float32})
    monkeypatch.setattr(steps, "bandwidth", lambda *_: 1e10)
    monkeypatch.setattr(variants, "SEEDS", range(2))
    monkeypatch.setattr(variants, "EPOCHS", 2)
    only = ["steps", "curve", "counts", "tune"] if gpu else ["steps", "variants"]
    given = options(gpu, "--quick", "--only", *only, "--out", str(tmp_path))
    assert plan.main(CPU, gpu, given) == 0
    (file,) = tmp_path.glob("*.json")
    results = json.loads(file.read_text())
    assert results["machine"]["torch"] == torch.__version__ and results["quick"]
    assert set(only) == results.keys() - {"machine", "quick"}
    found = {(r["optimizer"], r["implementation"]) for r in results["steps"]}
    assert found == {(o, i) for o in ("RMSprop", "Rprop") for i in EAGER}
    first = results["steps"][0]
    assert first["least_bytes"] == 3021 * 20
    floor = first["least_bytes"] / 1e10 * 1e6
    assert first["fraction_of_floor"] == pytest.approx(floor / first["wall_us"]["median"])
    printed = capsys.readouterr().out
    assert "| PINN |" in printed and ("no kernels run on cpu" in printed) == gpu


INTERPRETED = """
import torch
from perf import host, tune
host.COUNTS = 1, 3
launch = __import__("tritonopt.kernels.launch").kernels.launch
whole = launch.Launch.run
print(len(*host.host("Rprop", torch.device("cpu"))))
launch.Launch.run = whole
del tune.DTYPES["fp16"], tune.DTYPES["fp64"]
shapes = dict.fromkeys(tune.CHOSEN, [(3000,), (5,)])
for job in tune.jobs(torch.device("cpu"), True, shapes, seconds=0).values():
    print([(r["block"], r["threads"], r["wall_us"]["median"] > 0) for r in job()])
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
    assert grids == ["[(1024, 128, True), (2048, 256, True)]"] * 8


@pytest.mark.slow
@eager
def test_benchmarks(tmp_path):
    """pytest-benchmark is given the times that were measured in turns."""
    pytest.importorskip("pytest_benchmark")
    file = tmp_path / "benchmarks.json"
    chosen = "PINN and Rprop and (loop or foreach or replayed)"
    options = ("--quick", "--device", "cpu", "-k", chosen, f"--benchmark-json={file}")
    command = [sys.executable, "-m", "pytest", "perf", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed, 2 skipped" in done.stdout, done.stdout
    for found in json.loads(file.read_text())["benchmarks"]:
        measured = found["extra_info"]["wall_us"]["median"] * 1e-6
        assert found["group"] == "Rprop, PINN"
        assert found["stats"]["median"] == pytest.approx(measured, rel=1e-6)
