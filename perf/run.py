"""Runs the parts of a measurement, each until its time is up, and writes what they found."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from perf.implementations import Missing
from perf.timing import bandwidth

ROOT = Path(__file__).parent.parent
Job = Callable[[], Iterable[dict[str, Any]]]
Jobs = dict[str, Job]

CLOCKS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
          "power.limit", "temperature.gpu")  # fmt: skip


class Part(NamedTuple):
    jobs: Jobs
    seconds: float | None = None
    apart: bool = False  # each job in a process of its own


class TimeIsUp(BaseException):
    """Not an Exception: compilers catch those and go on."""


INTERRUPTED = 130
"""The exit code, as of shells."""


def run(parts: dict[str, Part], results: dict[str, Any], out: Path | None = None) -> None:
    """Adds the records of every part to `results`, and what is missing, with the reason."""
    for name, part in parts.items():
        found = results[name] = []
        left = list(part.jobs)
        try:
            with _at_most(part.seconds):
                for label in _progress(name, list(part.jobs)):
                    try:
                        job = part.jobs[label]
                        for record in apart(job) if part.apart else job():
                            found.append(record)
                    except Missing as why:
                        found.append({"job": label, "missing": str(why)})
                    except Exception as why:
                        found.append({"job": label, "missing": f"{type(why).__name__}: {why}"})
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


def apart(job: Callable[[], Any]) -> Any:
    """What a job finds in a process that nothing has run in.

    A compiler leaves a heap in pieces: steps over 1000 tensors, whose objects are found far from
    each other, then take up to twice their time. So an earlier job would decide about a later one.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_found, job).result()


def _found(job: Callable[[], Any]) -> Any:
    found = job()
    return list(found) if isinstance(found, Iterator) else found


@contextmanager
def _at_most(seconds: float | None) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeIsUp

    if seconds is None:
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again and again: a handler may swallow it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _progress(title: str, labels: list[str]) -> Iterator[str]:
    try:
        if not sys.stdout.isatty():  # a log
            raise ImportError
        from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        for number, label in enumerate(labels, 1):
            print(f"{title} {number}/{len(labels)}: {label}", flush=True)
            yield label
        return
    columns = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, auto_refresh=False) as progress:  # no thread: we time
        task = progress.add_task(title, total=len(labels))
        for label in labels:
            progress.update(task, description=f"{title}: {label}", refresh=True)
            yield label
            progress.update(task, advance=1)
        progress.update(task, description=title, refresh=True)


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


def child(module: str, *arguments: str, env: dict[str, str], seconds: float = 300) -> Any:
    """What a module that is run in a fresh process prints in its last line."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--one", *arguments],
        env=env, cwd=ROOT, capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


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
