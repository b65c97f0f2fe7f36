"""Runs jobs, each in a process of its own until its time is up, and writes what they find."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from time import monotonic
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from perf.implementations import Missing, reason
from perf.machine import accelerator, machine
from perf.tables import measured, tables

ROOT = Path(__file__).parent.parent
INTERRUPTED = 130
"""The exit code, as of shells."""


class Job(NamedTuple):
    part: str  # of the results
    label: str
    records: Callable[[], Iterable[dict[str, Any]]]  # is pickled
    seconds: float = 60  # at most
    env: dict[str, str] = {}
    compiles: int = 0  # parameters whose stock optimizer is compiled


def apart(
    records: Callable[[], Iterable[Any]], seconds: float, env: dict[str, str] | None = None
) -> Iterator[Any]:
    """What a job finds in a process in which nothing has run before; Missing if it fails.

    A compiler leaves a heap in pieces, in which steps over 1000 tensors take up to twice their
    time: an earlier job would decide about a later one. At its limit the process is killed, with
    all that it has started. Nothing is interrupted, as an exception that a signal's handler raises
    can come up in anybody's code, such as a callback of the garbage collector, which swallows it.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, records))
    end = monotonic() + seconds
    path = [*sys.path, str(ROOT)]  # pytest finds `perf` without it
    with patch.dict(os.environ, env or {}), patch.object(sys, "path", path):
        process.start()
    theirs.close()
    try:
        while ours.poll(max(0.0, end - monotonic())):
            kind, found = ours.recv()
            if kind == "failed":
                raise Missing(found)
            if kind == "done":
                return
            yield found
        raise Missing(f"not done after {seconds:.0f} s")
    except EOFError:
        process.join()
        raise Missing(f"the process ended with exit code {process.exitcode}") from None
    finally:
        with suppress(AttributeError, OSError):  # on Windows; of a process that has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        ours.close()


def _serve(pipe: Connection, records: Callable[[], Iterable[Any]]) -> None:
    with suppress(AttributeError):  # not on Windows
        os.setsid()
    Thread(target=_follow_parent, daemon=True).start()
    try:
        for found in records():
            pipe.send(("found", found))
        pipe.send(("done", None))
    except Exception as why:
        pipe.send(("failed", reason(why)))


def _follow_parent() -> None:
    """Ends this process, and all that it has started, when nobody waits for it any more."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def run(
    jobs: Sequence[Job], results: dict[str, Any], seconds: float, out: Path | None = None
) -> None:
    """Adds what the jobs find to `results`, and writes them after each job, as a later one may
    fail. When the seconds are over, what remains is said to be missing."""
    end = monotonic() + seconds
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for number, job in enumerate(jobs, 1):
            found = results.setdefault(job.part, [])
            try:
                left = end - monotonic()
                if left <= 0:
                    raise Missing(f"the {seconds:.0f} s were over")
                print(f"{number}/{len(jobs)} {job.part}: {job.label}", flush=True)
                env = {"TMPDIR": folder, **job.env}  # where a compiler keeps what it made
                for record in apart(job.records, min(job.seconds, left), env):
                    found.append(record)
            except Missing as why:
                found.append({"job": job.label, "missing": str(why)})
            finally:
                _write(results, out)


def _write(results: dict[str, Any], out: Path | None) -> None:
    """At once, so that a file is never half of one."""
    if out is not None:
        new = out.with_name(f"{out.name}.new")
        new.write_text(json.dumps(results, indent=1) + "\n")
        new.replace(out)


def command(
    plan: Callable[[torch.device, bool], list[Job]],
    seconds: float,
    stem: str | None = None,
    arguments: Sequence[str] | None = None,
    draw: Callable[[Path], None] | None = None,
) -> int:
    """The command of a plan of jobs; its exit code. The name of its results is that of the device,
    unless there is a stem."""
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, help="a folder for the results as JSON")
    add("--quick", action="store_true", help="few jobs, none that compiles a stock optimizer")
    add("--seconds", type=float, default=seconds, help="by which it ends (%(default)s)")
    add("--only", nargs="+", metavar="PART", help="parts of the results")
    add("--compiled-up-to", type=int, metavar="PARAMETERS",
        help="compile no stock optimizer of more than these")  # fmt: skip
    devices = ["cpu", *filter(None, [getattr(accelerator(), "type", None)])]
    add("--device", choices=devices, default="cpu" if stem else devices[-1])
    given = parser.parse_args(arguments)

    device = torch.device(given.device)
    jobs = plan(device, given.quick)
    parts = list(dict.fromkeys(job.part for job in jobs))
    if unknown := set(given.only or ()) - {*parts}:
        parser.error(f"no part {', '.join(unknown)}: choose of {', '.join(parts)}")
    up_to = given.compiled_up_to
    if up_to is None:
        up_to = 0 if given.quick else sys.maxsize
    jobs = [job for job in jobs if job.part in (given.only or parts) and job.compiles <= up_to]
    results = {"machine": machine(device), "quick": given.quick}
    name = stem or "".join(c if c.isalnum() else "-" for c in results["machine"]["device"].lower())
    out = given.out and given.out / f"{name}.json"
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    if lost := _lost(out, given.quick, {job.part for job in jobs}):
        print(f"{out} has {lost}: name another folder")
        return 2
    try:
        run(jobs, results, given.seconds, out)
    except KeyboardInterrupt:
        kept = f": {out} has what was found" if out else ""
        print(*tables(results), f"Interrupted{kept}.", sep="\n\n")
        return INTERRUPTED
    print(*tables(results), sep="\n\n")
    if out and draw:
        draw(out)
    return 0 if any(measured(results, part) for part in parts) else 1


def _lost(out: Path | None, quick: bool, parts: set[str]) -> str:
    """What a run would overwrite in a file, and not measure again."""
    if out is None or not out.exists():
        return ""
    before = json.loads(out.read_text())
    if quick and not before["quick"]:
        return "more than --quick measures"
    return ", ".join(sorted(before.keys() - {"machine", "quick", *parts}))
