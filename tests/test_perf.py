"""The instrument: its counts are right, its parts end in time, the README says what it found.

No test looks at how long anything took.
"""

import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from tritonopt.device import INTERPRET

ROOT = Path(__file__).parent.parent
perf = sys.modules.setdefault("perf", types.ModuleType("perf"))
perf.__path__ = [str(ROOT / "perf")]  # ROOT in sys.path would hide Hugging Face's `kernels`

from perf import (
    compile_time,
    memory,
    plan,
    plots,
    report,
    run,
    steps,
    tables,
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


def module(name, *arguments, **env):
    return subprocess.run(
        [sys.executable, "-m", name, *arguments],
        cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True,
    )  # fmt: skip


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


@eager
def test_memory_of_optimizers():
    work = Workload("Rprop", [(50_000,)] * 3, CPU)
    stock, ours = (memory.memory(work, IMPLEMENTATIONS[n]) for n in ("foreach", "tritonopt"))
    assert stock["state_bytes"] == ours["state_bytes"] == 8 * 150_000 + 3 * 4
    assert stock["kept_bytes"] < 10_000
    assert stock["peak_bytes"] >= 4 * 150_000 > ours["peak_bytes"]


def test_parts_end_in_time_and_keep_what_they_found(tmp_path):
    def forever():
        yield {"found": 1}
        while True:
            time.sleep(0.01)

    def broken():
        raise ZeroDivisionError("no")
        yield

    results = {}
    parts = {
        "late": run.Part({"first": forever, "second": forever}, seconds=0.3),
        "broken": run.Part({"job": broken, "next": lambda: [{"found": 2}]}),
    }
    run.run(parts, results, tmp_path / "folder" / "results.json")
    assert [r.get("job") for r in results["late"]] == [None, "first", "second"]
    assert "of this part were over" in results["late"][-1]["missing"]
    assert results["broken"] == [
        {"job": "job", "missing": "ZeroDivisionError: no"}, {"found": 2},
    ]  # fmt: skip
    assert json.loads((tmp_path / "folder" / "results.json").read_text()) == results


APART = """
import os
from functools import partial
from perf import run
jobs = {
    "process": partial(map, eval, ["{'process': __import__('os').getpid()}"]),
    "broken": partial(map, int, ["x"]),
}
results = {}
run.run({"part": run.Part(jobs, apart=True)}, results)
first, second = results["part"]
assert first["process"] != os.getpid()
assert second == {
    "job": "broken", "missing": "ValueError: invalid literal for int() with base 10: 'x'"
}
"""


def test_jobs_in_processes_of_their_own():
    command = [sys.executable, "-c", APART]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_progress_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    run.run({"part": run.Part({"one": list, "two": list})}, {})
    assert capsys.readouterr().out == "part 1/2: one\npart 2/2: two\n"


@eager
def test_graphs_are_counted_in_a_fresh_process():
    (record,) = compile_time.records("backend", "RMSprop", 2, CPU, seconds=200)
    assert record["graphs"] == 2 and 0 < record["first_step_s"] < record["all_steps_s"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu():
    done = module("perf.gpu")
    assert done.returncode == 2 and "needs a GPU" in done.stdout


@pytest.mark.parametrize("arguments", [["--device", "meta"], ["--device", "no"]], ids=str)
def test_devices_that_cannot_be_measured(arguments):
    done = module("perf.host", *arguments)
    assert done.returncode == 2 and arguments[1] in done.stderr


def test_a_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        options(False, "--out", str(tmp_path / "file"))
    assert "is no folder" in capsys.readouterr().err


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


def test_quick_results_do_not_replace_others(tmp_path, capsys):
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps({"machine": {}, "quick": False, "host": []}))
    given = options(False, "--quick", "--only", "host", "--out", str(tmp_path))
    assert plan.main(CPU, False, given) == 2
    assert "more than --quick measures" in capsys.readouterr().out


def test_results_of_another_run_are_not_lost(tmp_path, capsys):
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps({"machine": {}, "quick": True, "host": [], "memory": []}))
    before = file.read_text()
    given = plan.parser(None, False).parse_args(["--only", "host", "--out", str(tmp_path)])
    assert plan.main(CPU, False, given) == 2
    assert "has memory, too, of another run" in capsys.readouterr().out
    assert file.read_text() == before


@pytest.mark.parametrize("names", [["bitsandbytes"], ["compile()", "foreach, replayed"]], ids=str)
def test_what_is_asked_for_is_measured_or_said_to_be_missing(names):
    arguments = ["--quick", "--only", "steps", "--implementations", *names]
    (part,) = plan.plan(CPU, False, plan.parser(None, False).parse_args(arguments)).values()
    job = part.jobs["RMSprop, PINN"]
    assert job.args[2] == names and job.keywords["up_to"]["compiled"]


def test_a_report_without_matplotlib(monkeypatch, tmp_path, capsys):
    shutil.copytree(ROOT / "perf" / "results", tmp_path / "perf" / "results")
    (tmp_path / "README.md").write_text("<!-- perf:cpu host -->\n<!-- /perf -->")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert report.main([], tmp_path) == 2
    assert "matplotlib" in capsys.readouterr().out
    assert "| Rprop |" not in (tmp_path / "README.md").read_text()


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
@pytest.mark.parametrize("gpu", [False, True])
def test_everything_on_a_cpu(gpu, tmp_path, monkeypatch, capsys):
    """The GPU's plan, too, of which only the sweep over grids finds nothing to measure."""
    monkeypatch.setattr(plan, "QUICK", ("PINN",))
    monkeypatch.setattr(plan, "SIZES", [2**8])
    monkeypatch.setattr(plan, "COUNTS", (1, 3))
    monkeypatch.setattr(tune, "DTYPES", {"fp32": torch.float32})
    monkeypatch.setattr(steps, "bandwidth", lambda *_: 1e10)
    monkeypatch.setattr(variants, "SEEDS", range(2))
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
    plots.draw(file.stem, results, tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == (3 if gpu else 0)


INTERPRETED = """
import torch
from perf import host, tune
host.COUNTS = 1, 3
print(len(host.host("Rprop", torch.device("cpu"))))
del tune.DTYPES["fp16"], tune.DTYPES["fp64"]
shapes = dict.fromkeys(tune.CHOSEN, [(3000,), (5,)])
for job in tune.jobs(torch.device("cpu"), True, shapes, seconds=0).values():
    print([(r["block"], r["threads"], r["wall_us"]["median"] > 0) for r in job()])
from tritonopt.kernels import launch
print(launch.BLOCK, launch.THREADS)
"""


def test_host_and_grids_in_the_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, *grids, last = done.stdout.splitlines()
    assert first == "4" and last == "1024 128"
    assert grids == ["[(1024, 128, True), (2048, 256, True)]"] * 8


@eager
def test_benchmarks(tmp_path):
    """pytest-benchmark is given the times that were measured in turns."""
    pytest.importorskip("pytest_benchmark")
    file = tmp_path / "benchmarks.json"
    chosen = "PINN and Rprop and (loop or foreach or replayed)"
    options = ("--quick", "--device", "cpu", "-k", chosen, f"--benchmark-json={file}")
    done = module("pytest", "perf", *options)
    assert done.returncode == 0 and "2 passed, 2 skipped" in done.stdout, done.stdout
    for found in json.loads(file.read_text())["benchmarks"]:
        measured = found["extra_info"]["wall_us"]["median"] * 1e-6
        assert found["group"] == "Rprop, PINN"
        assert found["stats"]["median"] == pytest.approx(measured, rel=1e-6)


def test_the_readme_says_what_was_measured():
    assert report.main(["--check"]) == 0


def test_other_figures_are_noticed(tmp_path):
    shutil.copytree(ROOT / "perf" / "results", tmp_path / "perf" / "results")
    readme = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", readme)
    assert report.main(["--check"], tmp_path) == 0
    file = tmp_path / "perf" / "results" / "cpu.json"
    results = json.loads(file.read_text())
    results["machine"]["device"] += " of another kind"
    file.write_text(json.dumps(results))
    assert report.main(["--check"], tmp_path) == 1
    assert report.main([], tmp_path) == 0
    assert report.main(["--check"], tmp_path) == 0
    assert readme.read_text() != (ROOT / "README.md").read_text()
    next(file.parent.glob("*.png")).unlink()
    assert report.main(["--check"], tmp_path) == 1


def test_results_that_are_none(tmp_path, capsys):
    folder = tmp_path / "perf" / "results"
    folder.mkdir(parents=True)
    (tmp_path / "README.md").write_text("<!-- perf:cpu host -->\n<!-- /perf -->")
    (folder / "cpu.json").write_text("{")
    assert report.main(["--check"], tmp_path) == 2
    assert "cpu.json holds no results" in capsys.readouterr().out
    (folder / "cpu.json").write_text('{"machine": {}, "quick": false}')
    assert "\nNot measured.\n" in report.readme((tmp_path / "README.md").read_text(), folder)


def test_what_is_missing_is_neither_drawn_nor_tabulated(tmp_path):
    late = {"job": "Rprop, foreach, 50", "missing": "no time was left"}
    found = {"optimizer": "RMSprop", "implementation": "foreach", "tensors": 50,
             "first_step_s": 1.5, "graphs": 2}  # fmt: skip
    results = {"machine": {}, "compile": [found, late], "host": [late]}
    plots.draw("some", results, tmp_path)
    assert (tmp_path / "some-compile.png").exists()
    table = tables.TABLES["compile"](results).splitlines()
    assert not run.is_measured({"host": [late]}) and run.is_measured(results)
    assert table[2] == "| foreach | 50 | 1.5 s, 2 |"
    assert table[-1] == "Not measured: Rprop, foreach, 50: no time was left."
    assert tables.TABLES["host"](results) == table[-1]


def test_every_file_of_results_is_shown(tmp_path):
    """What a GPU found replaces what the README says of none."""
    machine = {"device": "Some GPU", "cuda": "13", "threads": 1, "torch": "2", "triton": "3",
               "date": "today"}  # fmt: skip
    times = {"median": 2000.0, "p10": 1000.0, "p90": 3000.0}
    step = {"optimizer": "RMSprop", "workload": "one", "implementation": "tritonopt",
            "wall_us": times, "device_us": times, "host_us": times,
            "bandwidth_bytes_per_s": 1e12, "fraction_of_floor": 0.5}  # fmt: skip
    text = "<!-- perf:gpu all -->\n<!-- /perf -->"
    assert "Not measured on a GPU yet." in report.readme(text, tmp_path)
    results = {"machine": machine, "quick": False, "steps": [step]}
    (tmp_path / "some-gpu.json").write_text(json.dumps(results))
    made = report.readme(text, tmp_path)
    assert "Some GPU, device copy 1,000.0 GB/s" in made
    assert made.count("| one | 2 (1 to 3) | - | 50% |") == 2
    assert made.count("| one | 2 (1 to 3) | - |\n") == 1  # of the host, no floor
    assert report.readme(made, tmp_path) == made
