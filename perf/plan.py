"""Everything that is measured on a device, within the time that each part of it may take."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from perf import compile_time, host, memory, steps, tune, variants
from perf.implementations import COMPILED_UP_TO, IMPLEMENTATIONS
from perf.machine import machine
from perf.run import Jobs, Part, folder, run_and_print
from perf.workloads import COUNTS, QUICK, SIZES, WORKLOADS, Shape

Shapes = dict[str, list[Shape]]

HEAD = ("machine", "quick")
NEED_GPU = [name for name, one in IMPLEMENTATIONS.items() if one.needs_gpu]
NOT_IN_PLOTS = ["backend", "bitsandbytes", "foreach, replayed"]


class Effort(NamedTuple):
    seconds: float  # per workload and optimizer
    compiled_up_to: dict[str, int]
    counts: tuple[int, ...]  # of parameters whose steps are compiled
    compiling: float  # seconds, at most, until all steps of one of these are done
    limits: dict[str, float]  # seconds of a part


CPU = Effort(2.0, COMPILED_UP_TO, compile_time.COUNTS, 75, {})
GPU = Effort(  # what takes longest comes last, and may not be reached
    0.3, {"compiled": 64, "backend": 200}, (20, 200), 25,
    {"steps": 175, "curve": 50, "counts": 25, "memory": 15, "host": 25, "compile": 75, "tune": 85},
)  # fmt: skip
QUICKLY = Effort(
    0.3, dict.fromkeys(("compiled", "compile()", "backend"), 0), (20,), 25,
    {"steps": 24, "curve": 10, "counts": 9, "memory": 14, "host": 14, "compile": 30, "tune": 7,
     "variants": 16},
)  # fmt: skip


def plan(device: torch.device, gpu: bool, options: argparse.Namespace) -> dict[str, Part]:
    quick = options.quick
    effort = QUICKLY if quick else GPU if gpu else CPU
    up_to = COMPILED_UP_TO if options.implementations else effort.compiled_up_to
    if options.compiled_up_to is not None:
        up_to = dict.fromkeys(up_to, options.compiled_up_to)
    left_out = [*[n for n in up_to if not up_to[n]], *([] if device.type == "cuda" else NEED_GPU)]
    names = options.implementations or [name for name in IMPLEMENTATIONS if name not in left_out]
    few = [name for name in names if name not in NOT_IN_PLOTS] or names
    chosen = {name: WORKLOADS[name] for name in (QUICK if quick else WORKLOADS)}
    large = {name: chosen[name] for name in chosen if name == "1 x 64M"}
    sizes = SIZES[:13:4] if quick else SIZES[::2] if gpu else SIZES
    curve: Shapes = {f"1 x {size}": [(size,)] for size in (sizes[::-1] if gpu else sizes)}
    counts: Shapes = {f"{count} x 64": [(64,)] * count for count in COUNTS[: 3 if quick else None]}
    common: dict[str, Any] = {"up_to": up_to, "seconds": effort.seconds}
    jobs: dict[str, Jobs] = {
        "steps": steps.jobs(chosen, names, device, **common)
        | steps.jobs(large, names, device, ("RMSprop, centered, momentum",), **common),
        "curve": steps.jobs(curve, few, device, **common),
        "counts": steps.jobs(counts, few, device, **common),
        "memory": memory.jobs(device, quick),
        "host": host.jobs(device, quick),
        "compile": compile_time.jobs(device, quick, effort.counts, effort.compiling),
    }
    jobs |= {"tune": tune.jobs(device, quick)} if gpu else {"variants": variants.jobs()}
    limits = effort.limits if quick or not options.implementations else {}
    apart = ("steps", "curve", "counts") if effort is CPU else ()  # else there is no time to begin
    return {
        name: Part(part, limits.get(name), name in apart)
        for name, part in jobs.items()
        if name in options.only
    }


def main(device: torch.device, gpu: bool, options: argparse.Namespace) -> int:
    found = machine(device)
    out = options.out and options.out / f"{'cpu' if not gpu else _slug(found['device'])}.json"
    lost = _lost(out, options)
    if lost:
        print(f"{out} has {lost}, of another run: name another folder")
        return 2
    results: dict[str, Any] = {"machine": found, "quick": options.quick}
    return run_and_print(plan(device, gpu, options), results, out)


def _lost(out: Path | None, options: argparse.Namespace) -> str:
    """What a run would overwrite in a file, and not replace."""
    if out is None or not out.exists():
        return ""
    before = json.loads(out.read_text())
    parts = sorted(before.keys() - {*HEAD, *options.only})
    full = options.quick and not before["quick"]
    return f"{', '.join(parts)}, too" if parts else "more than --quick measures" if full else ""


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def parser(description: str | None, gpu: bool) -> argparse.ArgumentParser:
    parts = [name for name in QUICKLY.limits if name != ("variants" if gpu else "tune")]
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--out", type=folder, help="a folder for the results as JSON")
    made.add_argument("--quick", action="store_true", help="under two minutes")
    made.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART",
                      help=f"of {', '.join(parts)}")  # fmt: skip
    made.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        metavar="NAME",
        help=f"of {'; '.join(IMPLEMENTATIONS)}; all that can be measured here, if not given;"
        " of those that are given, a part takes as long as it takes",
    )
    made.add_argument("--compiled-up-to", type=int, metavar="PARAMETERS",
                      help="compile no stock optimizer of more than these")  # fmt: skip
    return made
