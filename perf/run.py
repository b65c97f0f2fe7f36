"""Runs the parts of a measurement, each until its time is up, and writes what they found."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from perf.implementations import Missing, reason
from perf.timing import bandwidth, release

ROOT = Path(__file__).parent.parent
Job = Callable[[], Iterable[Any]]  # can be pickled where it runs in another process
Jobs = dict[str, Job]

CLOCKS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
          "power.limit", "temperature.gpu")  # fmt: skip
INTERRUPTED = 130
"""The exit code, as of shells."""


class Part(NamedTuple):
    jobs: Jobs
    seconds: float | None = None  # the part may take; what is limited runs in another process
    apart: bool = False  # each job in a process of its own


class TimeIsUp(Exception):
    """Of a part, or of a job."""


class Child:
    """A process that runs jobs. One that takes too long is killed, with all that it has started.

    Nothing is interrupted: an exception that a signal's handler raises can come up in anybody's
    code, such as a callback of the garbage collector, which swallows it.
    """

    def __init__(self, env: dict[str, str] | None = None) -> None:
        self.env = env or {}
        self.process: Any = None
        self.idle = True

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def __call__(self, job: Job, until: float | None = None) -> Iterator[Any]:
        """What a job finds. Raises Missing where it fails, TimeIsUp at `until`."""
        if self.process is None:
            self._start()
        try:
            self.idle = False
            self.pipe.send(job)
            while self.pipe.poll(None if until is None else max(0.0, until - monotonic())):
                kind, found = self.pipe.recv()
                if kind == "found":
                    yield found
                    continue
                self.idle = True
                if kind == "failed":
                    raise Missing(found)
                return
        except (EOFError, OSError):
            self.process.join()
            why = f"the process ended with exit code {self.process.exitcode}"
            self.end()
            raise Missing(why) from None
        self.end()
        raise TimeIsUp

    def _start(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, parent_process() is None))
        path = [*sys.path, str(ROOT)]  # pytest finds `perf` without it
        with patch.dict(os.environ, self.env), patch.object(sys, "path", path):
            self.process.start()
        theirs.close()

    def end(self) -> None:
        if self.process is None:
            return
        self.pipe.close()
        self.process.join(10 if self.idle else 0)
        if self.process.exitcode is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except (AttributeError, OSError):  # it has no group of its own
                self.process.kill()
            self.process.join()
        self.process = None


def _serve(pipe: Connection, leads: bool) -> None:
    if leads:
        with suppress(AttributeError):  # not on Windows
            os.setsid()
    while True:
        try:
            for found in pipe.recv()():
                pipe.send(("found", found))
            pipe.send(("done", None))
        except (EOFError, BrokenPipeError):  # nobody waits any more
            return
        except Exception as why:
            pipe.send(("failed", reason(why)))
        gc.collect()


def run(parts: dict[str, Part], results: dict[str, Any], out: Path | None = None) -> None:
    """Adds the records of every part to `results`, and what is missing, with the reason."""
    with Child() as child:
        for name, part in parts.items():
            found = results[name] = []
            left = list(part.jobs)
            until = None if part.seconds is None else monotonic() + part.seconds
            try:
                for number, (label, job) in enumerate(part.jobs.items(), 1):
                    print(f"{name} {number}/{len(part.jobs)}: {label}", flush=True)
                    try:
                        if part.apart:
                            child.end()
                        for record in child(job, until) if part.apart or until else job():
                            found.append(record)
                    except TimeIsUp:
                        raise
                    except Exception as why:
                        found.append({"job": label, "missing": reason(why)})
                    left.remove(label)
                    gc.collect()
            except TimeIsUp:
                late = f"the {part.seconds:.0f} s of this part were over"
                found += [{"job": label, "missing": late} for label in left]
            except KeyboardInterrupt:
                found += [{"job": label, "missing": "interrupted"} for label in left]
                _write(results, out)
                raise
            _write(results, out)  # after every part, as a later one may fail
    if out is not None:
        partial_file(out).replace(out)


def _write(results: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial_file(out).write_text(json.dumps(results, indent=1) + "\n")


def partial_file(out: Path) -> Path:
    """Of a run that has not ended."""
    return out.with_name(f"{out.name}.partial")


def is_measured(results: dict[str, Any]) -> bool:
    """Whether there is any figure."""
    parts = [part for part in results.values() if isinstance(part, list)]
    return any("missing" not in record for part in parts for record in part)


def apart(job: Job, env: dict[str, str] | None = None, seconds: float | None = None) -> list[Any]:
    """What a job finds in a process that nothing has run in.

    A compiler leaves a heap in pieces: steps over 1000 tensors, whose objects are found far from
    each other, then take up to twice their time. So an earlier job would decide about a later one.
    """
    with Child(env) as child:
        return list(child(job, None if seconds is None else monotonic() + seconds))


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": _cpu_name(), "threads": torch.get_num_threads(), "os": platform.system(),
        "python": platform.python_version(), "torch": torch.__version__,
        "triton": _version("triton"), "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "memory_bytes": properties.total_memory}
        found |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
        found |= _clocks(device, f"GPU-{getattr(properties, 'uuid', '')}")
    return found


def _clocks(device: torch.device, identity: str) -> dict[str, str]:
    """Asked for while the device is busy: idle, it lowers them."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(_nvidia_smi, identity)
        while not asked.done():
            bandwidth(device)
    release(device)  # another process measures
    return asked.result()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _nvidia_smi(identity: str) -> dict[str, str]:
    command = ["nvidia-smi", "-i", identity, f"--query-gpu={','.join(CLOCKS)}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = done.stdout.strip().split(", ")
    return dict(zip(CLOCKS, values, strict=True)) if len(values) == len(CLOCKS) else {}


def accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def usable_device(name: str) -> torch.device:
    """Of an argument."""
    available = {"cpu", getattr(accelerator(), "type", "cpu")}
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{name!r} is no device") from error
    if device.type not in available:
        raise argparse.ArgumentTypeError(f"{name!r} is not {' or '.join(sorted(available))}")
    return device


def folder(name: str) -> Path:
    """Of an argument."""
    path = Path(name)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{name!r} is no folder")
    return path


def script(part: str, jobs: Callable[[torch.device, bool], Jobs]) -> int:
    """The command of one part, which prints its table."""
    from perf.tables import tables

    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="under two minutes")
    parser.add_argument("--device", type=usable_device, default=accelerator() or "cpu")
    arguments = parser.parse_args()
    results = {"machine": machine(arguments.device), "quick": arguments.quick}
    try:
        run({part: Part(jobs(arguments.device, arguments.quick))}, results)
    except KeyboardInterrupt:
        print(*tables(results), "Interrupted.", sep="\n\n")
        return INTERRUPTED
    print(*tables(results), sep="\n\n")
    return 0 if is_measured(results) else 1
