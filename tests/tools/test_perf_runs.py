"""perf: a run begins with what matters most, ends in time, and keeps what it found."""

import json
import os
import runpy
import subprocess
import sys
from functools import partial

import pytest
import torch
from perf_cases import ROOT

from perf import cpu, gpu, run
from perf.implementations import RULES


def job(text):
    """What a spawned process can be given by this file, which it does not import."""
    return partial(eval, text, {})


FOREVER = job("(__import__('threading').Event().wait() if n else {'found': 1} for n in (0, 1))")


class Clock(list):
    """It goes on by 100 s with each record."""

    def __call__(self):
        return 100.0 * len(self)


@pytest.mark.slow
def test_jobs_end_in_time_and_what_they_found_is_kept(tmp_path, monkeypatch):
    found = Clock()
    monkeypatch.setattr(run, "monotonic", found)
    jobs = [
        run.Job("part", "limited", FOREVER, seconds=60),
        run.Job("part", "broken", job("1 / 0")),
        run.Job("part", "gone", job("__import__('os')._exit(3)")),
        run.Job("part", "late", FOREVER, seconds=600),
        run.Job("part", "none", job("[{'found': 2}]")),
    ]
    run.run(jobs, {"part": found}, 450, tmp_path / "results.json")
    assert found == [
        {"found": 1},
        {"job": "limited", "missing": "not done after 60 s"},
        {"job": "broken", "missing": "ZeroDivisionError: division by zero"},
        {"job": "gone", "missing": "the process ended with exit code 3"},
        {"found": 1},
        {"job": "late", "missing": "not done after 50 s"},
        {"job": "none", "missing": "the 450 s were over"},
    ]
    assert json.loads((tmp_path / "results.json").read_text()) == {"part": found}


KILLED = """
import sys
from functools import partial
from pathlib import Path
from perf import run
def jobs(pipe):
    code = f"import time; p = open({pipe!r}, 'w', 1); print(1, file=p); time.sleep(600)"
    start = f"__import__('subprocess').run([{sys.executable!r}, '-c', {code!r}])"
    return [run.Job("part", "first", partial(eval, "[{'found': 1}]", {})),
            run.Job("part", "second", partial(eval, f"({start} for n in (0, 1))", {}), 600)]
if __name__ == "__main__":
    run.run(jobs(sys.argv[1]), {}, 600, Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="looks at it through a named pipe")
def test_a_kill_in_the_middle_leaves_what_was_found_and_nothing_that_runs(tmp_path):
    pipe, out, script = tmp_path / "pipe", tmp_path / "out.json", tmp_path / "script.py"
    os.mkfifo(pipe)
    script.write_text(KILLED)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, script, pipe, out], cwd=ROOT, env=env) as process:
        with pipe.open() as reader:  # waits for who writes
            assert reader.readline() == "1\n"
            process.kill()
            assert reader.read() == ""  # nobody will write any more
    assert json.loads(out.read_text()) == {"part": [{"found": 1}]}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["perf.gpu"])
    monkeypatch.delitem(sys.modules, "perf.gpu")  # it is run as a command
    with pytest.raises(SystemExit) as end:
        runpy.run_module("perf.gpu", run_name="__main__")
    assert end.value.code == 2 and "needs a GPU" in capsys.readouterr().out


def test_devices_that_cannot_be_measured(capsys):
    with pytest.raises(SystemExit):
        run.command(cpu.plan, 60, "cpu", ["--device", "meta"])
    assert "invalid choice: 'meta'" in capsys.readouterr().err


def test_an_interrupted_run_keeps_what_it_found(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        yield {"optimizer": "RMSprop", "us_of_1": 1.0, "us_of_1000": 2.0,
               "us_per_further_parameter": 0.1, "us_of_1000_after_backward": 3.0}  # fmt: skip
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "apart", interrupt)
    arguments = ["--only", "host", "--out", str(tmp_path)]
    assert run.command(cpu.plan, 60, "cpu", arguments) == 130
    (file,) = tmp_path.iterdir()
    (found,) = json.loads(file.read_text())["host"]
    assert file.name == "cpu.json" and found["us_of_1"] == 1
    printed = capsys.readouterr().out
    assert "1/2 host: RMSprop" in printed and "Interrupted" in printed


MOST_IMPORTANT = {
    "cpu": ["1000 x 64", "1 x 64M", "ResNet-50", "LSTM", "DQN", "MobileNetV3-Large", "1 x 8M"],
    "cuda": ["1 x 64M", "1 x 256M", "1000 x 64", "ResNet-50", "GPT-2 124M"],
}


@pytest.mark.parametrize("device", MOST_IMPORTANT)
def test_what_matters_most_comes_first_and_what_compiles_long_last(device):
    jobs = (gpu if device == "cuda" else cpu).plan(torch.device(device), False)
    measured = [work for job in jobs if job.part == "steps" for work in job.records.args[0]]
    first = list(dict.fromkeys(label for label, _ in measured))
    assert first == MOST_IMPORTANT[device]
    assert {work.configuration for _, work in measured[: 2 * len(first)]} == {*RULES}
    assert not any(job.compiles for job in jobs[: len(first)])
    long = [job.compiles > 100 and job.part == "steps" for job in jobs]
    assert any(long) and long == sorted(long)


def test_no_stock_optimizer_is_compiled_quickly(monkeypatch):
    chosen = []
    monkeypatch.setattr(run, "run", lambda jobs, *_: chosen.append(jobs))
    for arguments in ([], ["--quick"], ["--compiled-up-to", "64"]):
        run.command(cpu.plan, 60, "cpu", arguments)
    assert [max(job.compiles for job in jobs) for jobs in chosen] == [1000, 0, 50]
    assert len(chosen[1]) < len(chosen[2]) < len(chosen[0])
