"""Runs the parts of a measurement, each until its time is up, and writes what they found."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import torch

from perf.child import Child, Job, TimeIsUp
from perf.implementations import reason
from perf.machine import accelerator, machine, usable_device
from perf.tables import tables

Jobs = dict[str, Job]

INTERRUPTED = 130
"""The exit code, as of shells."""


class Part(NamedTuple):
    jobs: Jobs
    seconds: float | None = None  # the part may take; what is limited runs in another process
    apart: bool = False  # each job in a process of its own


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
        _partial(out).replace(out)


def run_and_print(parts: dict[str, Part], results: dict[str, Any], out: Path | None = None) -> int:
    """The exit code. What was found before an interruption is printed, too."""
    try:
        run(parts, results, out)
    except KeyboardInterrupt:
        kept = f": {_partial(out)} has what was found" if out else ""
        print(*tables(results), f"Interrupted{kept}.", sep="\n\n")
        return INTERRUPTED
    print(*tables(results), sep="\n\n")
    return 0 if is_measured(results) else 1


def _write(results: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        _partial(out).write_text(json.dumps(results, indent=1) + "\n")


def _partial(out: Path) -> Path:
    """Of a run that has not ended."""
    return out.with_name(f"{out.name}.partial")


def is_measured(results: dict[str, Any]) -> bool:
    """Whether there is any figure."""
    parts = [part for part in results.values() if isinstance(part, list)]
    return any("missing" not in record for part in parts for record in part)


def folder(name: str) -> Path:
    """Of an argument."""
    path = Path(name)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{name!r} is no folder")
    return path


def script(part: str, jobs: Callable[[torch.device, bool], Jobs]) -> int:
    """The command of one part."""
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="under two minutes")
    parser.add_argument("--device", type=usable_device, default=accelerator() or "cpu")
    arguments = parser.parse_args()
    results = {"machine": machine(arguments.device), "quick": arguments.quick}
    return run_and_print({part: Part(jobs(arguments.device, arguments.quick))}, results)
