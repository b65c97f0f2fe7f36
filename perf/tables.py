"""Results as tables of perf/README.md, and the short one of the README.

A record of what is not measured any more is left out; where there are several, the last one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from perf.implementations import COMPILED, IMPLEMENTATIONS, RULES

Record = dict[str, Any]
Results = dict[str, Any]
KEY = ("optimizer", "workload", "tensors", "implementation", "dtype", "block", "threads")
OURS = ("tritonopt", "compile()", "tritonopt, replayed")  # whose part of the floor is shown
SHORT = ("1000 x 64", "ResNet-50", "GPT-2 124M", "LSTM")
SHORT_NAMES = ("for-loop", "foreach", "compiled", "tritonopt", "compile()")


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def known(results: Results, part: str) -> list[Record]:
    return [
        record for record in results.get(part, [])
        if "job" in record or record.get("implementation", OURS[0]) in IMPLEMENTATIONS
    ]  # fmt: skip


def measured(results: Results, part: str) -> list[Record]:
    records = [record for record in known(results, part) if "missing" not in record]
    return list({tuple(record.get(key) for key in KEY): record for record in records}.values())


def unique(records: list[Record], *keys: str) -> list[Any]:
    """The values of one key, or tuples of those of some, in the order of the records."""
    found = dict.fromkeys(tuple(record[key] for key in keys) for record in records)
    return [values[0] if len(keys) == 1 else values for values in found]


def implementations(records: list[Record]) -> list[str]:
    found = {record["implementation"] for record in records}
    return [name for name in IMPLEMENTATIONS if name in found]


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], text: int = 1) -> str:
    """A table of which the first columns are text, the others figures."""
    rule = ["---"] * text + ["---:"] * (len(head) - text)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows)) if rows else ""


def reasons(results: Results, part: str) -> str:
    """Why figures are missing."""
    found: dict[str, dict[str, None]] = {}
    for record in known(results, part):
        if "missing" in record:
            what = record.get("job") or record.get("implementation", "")
            found.setdefault(record["missing"], {})[what] = None
    texts = []
    for why, names in found.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        texts.append(f"Not measured: {'; '.join(list(names)[:3])}{more}: {why}.")
    return "\n".join(texts)


def machine(results: Results, with_bandwidth: bool = True) -> str:
    found = results["machine"]
    texts = [found["device"]]
    texts += [f"driver {found['driver_version']}"] if "driver_version" in found else []
    timed = [record for part in ("steps", "curve") for record in measured(results, part)]
    rates = [record["bandwidth_bytes_per_s"] for record in timed]
    if rates and with_bandwidth:
        kind = "device copy" if "cuda" in found else "in-place triad"
        ends = dict.fromkeys(f"{rate / 1e9:,.1f}" for rate in (min(rates), max(rates)))
        texts.append(f"{kind} {' to '.join(ends)} GB/s")
    texts += [f"{found['threads']} threads", f"torch {found['torch']}"]
    texts += [f"triton {found['triton']}", found["date"]]
    texts += ["a run with `--quick`, which times no compiled step"] if results["quick"] else []
    return ", ".join(texts) + "."


def _milliseconds(record: Record | None, clock: str, spread: bool = False) -> str:
    if record is None:
        return "-"
    low, middle, high = (figure(record[clock][key] / 1e3) for key in ("p10", "median", "p90"))
    return f"{middle} ({low} to {high})" if spread else middle


def steps(results: Results, clock: str = "wall_us", part: str = "steps") -> str:
    """Medians, ours with their spread; how much faster, and how near to the floor."""
    texts = []
    records = measured(results, part)
    for optimizer in unique(records, "optimizer"):
        some = [record for record in records if record["optimizer"] == optimizer]
        names = implementations(some)
        floors = [name for name in OURS if name in names and clock != "host_us"]
        head = [optimizer, *names, "times the better stock"]
        head += [f"{name}: of the floor" for name in floors]
        rows = []
        for workload in unique(some, "workload"):
            of = {r["implementation"]: r for r in some if r["workload"] == workload}
            row = [workload, *(_milliseconds(of.get(n), clock, n in OURS) for n in names)]
            stock = [of[name][clock]["median"] for name in ("for-loop", "foreach") if name in of]
            is_compared = stock and "tritonopt" in of
            row += [figure(min(stock) / of["tritonopt"][clock]["median"]) if is_compared else "-"]
            row += [f"{of[n]['fraction_of_floor']:.0%}" if n in of else "-" for n in floors]
            rows.append(row)
        texts.append(grid(head, rows))
    return "\n\n".join(texts)


def summary(results: Results) -> str:
    """Medians of few steps, and where they were measured."""
    records = measured(results, "steps")
    of = {(r["optimizer"], r["workload"], r["implementation"]): r for r in records}
    rows = []
    for optimizer in RULES:
        for workload in SHORT:
            found = [of.get((optimizer, workload, name)) for name in SHORT_NAMES]
            if any(found):
                cells = [_milliseconds(record, "wall_us") for record in found]
                rows.append([f"{optimizer}, {workload}", *cells])
    return f"{grid(['ms per step', *SHORT_NAMES], rows)}\n\n{machine(results, False)}"


def options(results: Results) -> str:
    """Bytes of an element; medians with their spread, and in how many times the plain one's."""
    texts = []
    records = measured(results, "options")
    for optimizer in unique(records, "optimizer"):
        some = [record for record in records if record["optimizer"] == optimizer]
        of = {(record["workload"], record["implementation"]): record for record in some}
        eager = dict.fromkeys(name for name in implementations(some) if name in COMPILED)
        columns = [
            (label, names) for label in unique(some, "workload")
            for names in ({name: name for name in eager}, COMPILED)
            if (label, names["tritonopt"]) in of
        ]  # fmt: skip
        rows = []
        for name in eager:
            (first, *_) = (record for record in some if record["implementation"] == name)
            moved = first["least_bytes"] / first["elements"]
            row = [f"`{name}`" if "=" in name else name]
            row += [str(first["state_bytes_per_element"]), f"{moved:.0f}"]
            for label, names in columns:
                found, plain = of.get((label, names[name])), of[label, names["tritonopt"]]
                clock = "device_us" if plain["device_us"] else "wall_us"
                cell = _milliseconds(found, clock, spread=True)
                if found not in (None, plain):
                    cell += f", x {found[clock]['median'] / plain[clock]['median']:.2f}"
                row.append(cell)
            rows.append(row)
        head = [f"{label}, {names['tritonopt']}" for label, names in columns]
        texts.append(grid([optimizer, "state", "moved", *head], rows))
    return "\n\n".join(texts)


def memory(results: Results, part: str = "memory") -> str:
    """Bytes per element of state, and of what a step needs; KiB of what else is kept."""
    records = measured(results, part)
    cells = {}
    for r in records:
        state, peak = (r[f"{kind}_bytes"] / r["elements"] for kind in ("state", "peak"))
        cell = f"{state:.1f} + {peak:.1f}, {r['kept_bytes'] / 1024:,.0f} KiB"
        cells[r["optimizer"], r["workload"], r["implementation"]] = cell
    names = implementations(records)
    keys = unique(records, "optimizer", "workload")
    rows = [[*key, *(cells.get((*key, name), "-") for name in names)] for key in keys]
    return grid(["optimizer", "workload", *names], rows, text=2)


def host(results: Results) -> str:
    rows = [
        [r["optimizer"], f"{r['us_of_1']:.0f}", f"{r['us_of_1000']:.0f}",
         f"{r['us_per_further_parameter']:.2f}", f"{r['us_of_1000_after_backward']:.0f}"]
        for r in measured(results, "host")
    ]  # fmt: skip
    head = ["", "us, 1 parameter", "us, 1000 parameters", "us per further parameter"]
    return grid([*head, "us, 1000 parameters, a backward before every step"], rows)


def compile_time(results: Results) -> str:
    """Seconds to the first step, and graphs over all steps."""
    records = measured(results, "compile")
    optimizers = unique(records, "optimizer")
    cells = {
        (r["implementation"], r["tensors"], r["optimizer"]):
        f"{r['first_step_s']:.1f} s, {r['graphs']}" for r in records
    }  # fmt: skip
    rows = [
        [name, f"{count:,}", *(cells.get((name, count, one), "-") for one in optimizers)]
        for name, count in sorted(unique(records, "implementation", "tensors"))
    ]
    return grid(["", "parameters", *optimizers], rows)


def tune(results: Results) -> str:
    """The fastest grid of each kernel, dtype and workload, beside the library's."""
    records = measured(results, "tune")
    rows = []
    for key in unique(records, "workload", "optimizer", "dtype"):
        same = [r for r in records if (r["workload"], r["optimizer"], r["dtype"]) == key]
        best = max(same, key=rate)
        ours = [figure(rate(record)) for record in same if record["is_ours"]] or ["-"]
        rows.append([*key, f"{best['block']} / {best['threads']}", figure(rate(best)), *ours])
    head = ["workload", "optimizer", "dtype", "block / threads", "GB/s", "the library's: GB/s"]
    return grid(head, rows, text=3)


def precision(record: Record) -> str:
    name = record["implementation"]
    dtype = "fp32" if record["dtype"] == "torch.float32" else "bf16"
    return dtype if name == "tritonopt" else f"{dtype}, {name}"


def bf16(results: Results) -> str:
    """What trainings in fp32 and bf16 come to: medians, and the ends over all starts."""
    rows = []
    for record in measured(results, "bf16"):
        ends = [record[key] for key in ("loss", "way", "squares")]
        cells = ["{median:.3g} ({least:.3g} to {most:.3g})".format(**of) for of in ends]
        cells[2] = cells[2] if ends[2]["most"] else "-"  # of Rprop
        rows.append([record["optimizer"], precision(record), *cells])
    head = ["training", "parameters", "final loss", "way from the start", "sum of `square_avg`"]
    return grid(head, rows, text=2)


def rate(record: Record) -> float:
    """GB/s of the least bytes."""
    taken = (record["device_us"] or record["wall_us"])["median"]
    return float(record["least_bytes"] / taken / 1e3)


MEMORY = "Bytes per element: of state, and of what a step needs"


class Table(NamedTuple):
    part: str
    title: str
    text: Callable[[Results], str]


TABLES = {
    "machine": Table("machine", "", machine),
    "steps": Table("steps", "Milliseconds until the device has done a step", steps),
    "device_steps": Table("steps", "Milliseconds of the kernels alone",
                          partial(steps, clock="device_us")),
    "host_steps": Table("steps", "Milliseconds until `step()` returns",
                        partial(steps, clock="host_us")),
    "curve": Table("curve", "Milliseconds of a step over one parameter",
                   partial(steps, part="curve")),
    "memory": Table("memory", f"{MEMORY}; and what else is kept", memory),
    "options": Table("options", "Options beside the plain optimizer: bytes of an element, and"
                     " milliseconds", options),
    "options_memory": Table("options_memory", f"{MEMORY}; and what else is kept, with options",
                            partial(memory, part="options_memory")),
    "bf16": Table("bf16", "Trainings in bf16 beside fp32", bf16),
    "host": Table("host", "What the host does, the launch left out", host),
    "compile": Table("compile", "Seconds to the first step, and graphs in 50 steps", compile_time),
    "tune": Table("tune", "The fastest grids, beside the library's", tune),
    "summary": Table("steps", "", summary),
}  # fmt: skip


def table(results: Results, name: str) -> str:
    """Of a part, and what is missing; empty where nothing is known of it."""
    part, _, text = TABLES[name]
    if part not in results or (name.endswith("_steps") and "cuda" not in results["machine"]):
        return ""
    missing = reasons(results, part) if name == part != "machine" else ""
    return "\n\n".join(filter(None, [text(results), missing]))


def tables(results: Results) -> Iterator[str]:
    """All that there are figures for, with titles."""
    for name, (_, title, _) in TABLES.items():
        if name != "summary" and (found := table(results, name)):
            yield from filter(None, [title and f"{title}:", found])
