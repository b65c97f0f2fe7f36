"""Everything that is measured on a device, within the time that each part of it may take."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from perf import compile_time, host, memory, steps, tune, variants
from perf.implementations import COMPILED_UP_TO, IMPLEMENTATIONS
from perf.report import tables
from perf.run import Part, machine, run
from perf.timing import bandwidth
from perf.workloads import COUNTS, QUICK, SIZES, WORKLOADS

GPU_SECONDS = {"steps": 170, "curve": 50, "counts": 25, "memory": 15, "host": 20, "compile": 55,
               "tune": 85}  # 7 minutes  # fmt: skip
QUICK_SECONDS = {"steps": 35, "curve": 8, "counts": 6, "memory": 15, "host": 15, "compile": 25,
                 "tune": 8, "variants": 8}  # fmt: skip
CPU_UP_TO = COMPILED_UP_TO
GPU_UP_TO, QUICK_UP_TO = {"compiled": 64, "backend": 200}, {"compiled": 0, "backend": 0}
NEED_GPU = [name for name, one in IMPLEMENTATIONS.items() if one.needs_gpu]
NOT_IN_PLOTS = ["backend", "bitsandbytes", "foreach, replayed"]


def plan(
    device: torch.device, gpu: bool, quick: bool, options: argparse.Namespace, speed: float
) -> dict[str, Part]:
    names = [n for n in options.implementations if device.type == "cuda" or n not in NEED_GPU]
    seconds = 0.3 if quick or gpu else 4.0
    up_to = QUICK_UP_TO if quick else GPU_UP_TO if gpu else CPU_UP_TO
    if options.compiled_up_to is not None:
        up_to = dict.fromkeys(up_to, options.compiled_up_to)
    names = [name for name in names if up_to.get(name) != 0]
    common: dict[str, Any] = {"up_to": up_to, "seconds": seconds, "bandwidth": speed}
    few = [n for n in names if n not in NOT_IN_PLOTS and not (quick and n == "compile()")]
    chosen = {name: WORKLOADS[name] for name in (QUICK if quick else WORKLOADS)}
    curve = {f"1 x {size}": [(size,)] for size in (SIZES[:13:4] if quick else SIZES[::2])}
    counts = {f"{count} x 64": [(64,)] * count for count in COUNTS[: 3 if quick else None]}
    large = {name: chosen[name] for name in chosen if name == "1 x 64M"}
    jobs = {
        "steps": steps.jobs(chosen, names, device, **common)
        | steps.jobs(large, names, device, ("RMSprop, centered, momentum",), **common),
        "curve": steps.jobs(curve, few, device, **common),
        "counts": steps.jobs(counts, few, device, **common),
        "memory": memory.jobs(device, quick),
        "host": host.jobs(device, quick),
        "compile": (
            compile_time.jobs(device, quick, counts=(200,), seconds=25)
            if gpu
            else compile_time.jobs(device, quick)
        ),
    }
    jobs |= {"tune": tune.jobs(device, quick)} if gpu else {"variants": variants.jobs(quick)}
    limits = QUICK_SECONDS if quick else GPU_SECONDS if gpu else {}
    return {
        name: Part(part, limits.get(name))
        for name, part in jobs.items()
        if name in (options.only or jobs)
    }


def main(device: torch.device, gpu: bool, options: argparse.Namespace) -> int:
    elements = 2**24 if options.quick else 2**28 if device.type == "cuda" else 2**26
    speed = bandwidth(device, elements)
    found = {**machine(device), "bandwidth_bytes_per_s": speed}
    results: dict[str, Any] = {"machine": found, "quick": options.quick}
    out = options.out and options.out / f"{'cpu' if not gpu else _slug(found['device'])}.json"
    parts = plan(device, gpu, options.quick, options, speed)
    run(parts, results, out)
    print(*tables(results), sep="\n\n")
    return 0


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--out", type=Path, help="a folder for the results as JSON")
    made.add_argument("--quick", action="store_true", help="under two minutes")
    split = partial(str.split, sep=",")
    made.add_argument("--only", type=split, help="parts, with commas: steps,memory")
    made.add_argument("--implementations", type=split, default=list(IMPLEMENTATIONS))
    made.add_argument("--compiled-up-to", type=int, metavar="PARAMETERS",
                      help="leave out compiled stock optimizers of more than these")  # fmt: skip
    return made
