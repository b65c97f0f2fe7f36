"""Results as tables of perf/README.md, and the short one of the README."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

Results = dict[str, Any]
GONE = ("torch.compile(step)",)  # no more an entrance, but measured once
OURS = ("tritonopt", "compile()", "tritonopt, replayed")  # whose part of the floor is shown


def grid(
    head: Sequence[str], rows: list[list[str]], records: list[dict[str, Any]], text: int = 1
) -> str:
    """A table of which the first columns are text, the others figures; and what is missing."""
    rule = ["---"] * text + ["---:"] * (len(head) - text)
    lines = ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)] if rows else []
    return "\n\n".join(filter(None, ["\n".join(lines), _reasons(records)]))


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def machine(results: Results, with_bandwidth: bool = True) -> str:
    found = results["machine"]
    texts = [found["device"]]
    texts += [f"driver {found['driver_version']}"] if "driver_version" in found else []
    timed = [r for part in ("steps", "curve", "counts") for r in results.get(part, [])]
    rates = [r["bandwidth_bytes_per_s"] for r in timed if _is_measured(r)]
    if rates and with_bandwidth:
        kind = "device copy" if "cuda" in found else "in-place triad"
        ends = dict.fromkeys(f"{rate / 1e9:,.1f}" for rate in (min(rates), max(rates)))
        texts.append(f"{kind} {' to '.join(ends)} GB/s")
    texts += [f"{found['threads']} threads", f"torch {found['torch']}"]
    texts += [f"triton {found['triton']}", found["date"]]
    texts += ["a run with `--quick`, which times no compiled step"] if results["quick"] else []
    return ", ".join(texts) + "."


def _names(records: list[dict[str, Any]]) -> list[str]:
    """Of the implementations that were measured at all."""
    return list(dict.fromkeys(r["implementation"] for r in records if _is_measured(r)))


def _is_measured(record: dict[str, Any]) -> bool:
    return "missing" not in record


def steps(results: Results, clock: str = "wall_us", part: str = "steps") -> str:
    """Times in ms: medians, ours with their spread; how much faster, and how near to the floor."""
    records = [r for r in results[part] if "job" not in r]
    tables = []
    for optimizer in dict.fromkeys(r["optimizer"] for r in records):
        some = [r for r in records if r["optimizer"] == optimizer]
        names = _names(some)
        ours = [name for name in OURS if name in names]
        of_floor = ours if clock != "host_us" else []
        head = [optimizer, *names, "times the better stock"]
        head += [f"{name}: of the floor" for name in of_floor]
        rows = []
        for workload in dict.fromkeys(r["workload"] for r in some):
            by_name = {
                r["implementation"]: r
                for r in some
                if r["workload"] == workload and _is_measured(r)
            }
            stock = [by_name[n][clock]["median"] for n in ("for-loop", "foreach") if n in by_name]
            faster = "-"
            if stock and "tritonopt" in by_name:
                faster = figure(min(stock) / by_name["tritonopt"][clock]["median"])
            cells = [_time(by_name.get(name), clock, name in ours) for name in names]
            floors = [_floor(by_name.get(name)) for name in of_floor]
            rows.append([workload, *cells, faster, *floors])
        tables.append(grid(head, rows, []))
    return "\n\n".join(filter(None, [*tables, _reasons(results[part])]))


SHORT = (
    ("1000 x 64", "ResNet-50", "GPT-2 124M", "LSTM"),
    ("for-loop", "foreach", "compiled", "tritonopt", "compile()"),
)


def summary(results: Results) -> str:
    """Medians of few steps, and where they were measured."""
    workloads, names = SHORT
    by_key = {
        (r["optimizer"], r["workload"], r["implementation"]): r
        for r in filter(_is_measured, results["steps"])
    }
    rows = [
        [f"{optimizer}, {workload}",
         *(_time(by_key.get((optimizer, workload, name)), "wall_us", False) for name in names)]
        for optimizer in ("RMSprop", "Rprop")
        for workload in workloads
    ]  # fmt: skip
    return f"{grid(['ms per step', *names], rows, [])}\n\n{machine(results, with_bandwidth=False)}"


def _floor(record: dict[str, Any] | None) -> str:
    return "-" if record is None else f"{record['fraction_of_floor']:.0%}"


def _time(record: dict[str, Any] | None, clock: str, spread: bool) -> str:
    if record is None:
        return "-"
    low, middle, high = (figure(record[clock][key] / 1e3) for key in ("p10", "median", "p90"))
    return f"{middle} ({low} to {high})" if spread else middle


def _reasons(records: list[dict[str, Any]]) -> str:
    """Why figures are missing."""
    found: dict[str, list[str]] = {}
    for record in records:
        if not _is_measured(record):
            what = record.get("job") or record.get("implementation", "")
            found.setdefault(record["missing"], []).append(what)
    texts = []
    for why, what in found.items():
        names = list(dict.fromkeys(what))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        texts.append(f"Not measured: {'; '.join(names[:3])}{more}: {why}.")
    return "\n".join(texts)


def memory(results: Results) -> str:
    """Bytes per element of state, and of what a step needs; KiB of what else is kept."""
    records = list(filter(_is_measured, results["memory"]))
    names = _names(records)
    rows: dict[tuple[str, str], list[str]] = {}
    for record in records:
        state, peak = (record[f"{kind}_bytes"] / record["elements"] for kind in ("state", "peak"))
        row = rows.setdefault((record["optimizer"], record["workload"]), ["-"] * len(names))
        cell = f"{state:.1f} + {peak:.1f}, {record['kept_bytes'] / 1024:,.0f} KiB"
        row[names.index(record["implementation"])] = cell
    body = [[*key, *row] for key, row in rows.items()]
    return grid(["optimizer", "workload", *names], body, results["memory"], text=2)


def host(results: Results) -> str:
    rows = [
        [r["optimizer"], f"{r['us_of_1']:.0f}", f"{r['us_of_1000']:.0f}",
         f"{r['us_per_further_parameter']:.2f}", f"{r['us_of_1000_after_backward']:.0f}"]
        for r in filter(_is_measured, results["host"])
    ]  # fmt: skip
    head = ["", "us, 1 parameter", "us, 1000 parameters", "us per further parameter"]
    head += ["us, 1000 parameters, a backward before every step"]
    return grid(head, rows, results["host"])


def compile_time(results: Results) -> str:
    """Seconds to the first step, and graphs over all steps."""
    records = [r for r in results["compile"] if r.get("implementation") not in GONE]
    names = list(dict.fromkeys(r["optimizer"] for r in records if "job" not in r))
    rows: dict[tuple[str, int], list[str]] = {}
    for record in records:
        if "job" not in record:
            key = record["implementation"], record["tensors"]
            cell = record.get("missing") or f"{record['first_step_s']:.1f} s, {record['graphs']}"
            rows.setdefault(key, ["-"] * len(names))[names.index(record["optimizer"])] = cell
    body = [[name, f"{count:,}", *cells] for (name, count), cells in sorted(rows.items())]
    return grid(["", "parameters", *names], body, [r for r in records if "job" in r])


def variants(results: Results) -> str:
    rows = [
        [f'`"{r["variant"]}"`', *(f"{r[key]:.2e}" for key in ("median", "least", "greatest"))]
        for r in filter(_is_measured, results["variants"])
    ]
    return grid(["`variant`", "loss: median", "least", "greatest"], rows, results["variants"])


def tune(results: Results) -> str:
    """The fastest grid of each kernel, dtype and workload, beside the library's."""
    records = list(filter(_is_measured, results["tune"]))
    rows = []
    for key in dict.fromkeys((r["workload"], r["optimizer"], r["dtype"]) for r in records):
        same = [r for r in records if (r["workload"], r["optimizer"], r["dtype"]) == key]
        rates = {_tiling(r): r["least_bytes"] / taken(r) / 1e3 for r in same}
        best = max(rates, key=lambda tiling: rates[tiling])
        ours = [figure(rates[_tiling(r)]) for r in same if r["is_ours"]] or ["-"]
        rows.append([*key, f"{best[0]} / {best[1]}", figure(rates[best]), *ours])
    head = ["workload", "optimizer", "dtype", "block / threads", "GB/s", "the library's: GB/s"]
    return grid(head, rows, results["tune"], text=3)


def _tiling(record: dict[str, Any]) -> tuple[int, int]:
    return record["block"], record["threads"]


def taken(record: dict[str, Any]) -> float:
    return float((record["device_us"] or record["wall_us"])["median"])


TABLES: dict[str, tuple[str, Callable[[Results], str]]] = {
    "machine": ("", machine),
    "steps": ("Milliseconds until the device has done a step", steps),
    "device_steps": ("Milliseconds of the kernels alone", partial(steps, clock="device_us")),
    "host_steps": ("Milliseconds until `step()` returns", partial(steps, clock="host_us")),
    "curve": ("Milliseconds of a step over one parameter", partial(steps, part="curve")),
    "counts": ("Milliseconds of a step over parameters of 64 elements",
               partial(steps, part="counts")),
    "memory": ("Bytes per element: of state, and of what a step needs; and what else is kept",
               memory),
    "host": ("What the host does, the launch left out", host),
    "compile": ("Seconds to the first step, and graphs in 50 steps", compile_time),
    "variants": ("The loss after 100 epochs", variants),
    "tune": ("The fastest grids, beside the library's", tune),
    "summary": ("", summary),
}  # fmt: skip


def table(results: Results, name: str) -> str:
    """Of a part; empty where there are no figures for it."""
    timed = name == "summary" or (name.endswith("_steps") and "cuda" in results["machine"])
    known = name in results or (timed and "steps" in results)
    return TABLES[name][1](results) if known else ""


def tables(results: Results) -> Iterator[str]:
    """All that there are figures for, with titles."""
    for name, (title, _) in TABLES.items():
        if name != "summary" and (found := table(results, name)):
            yield from filter(None, [title and f"{title}:", found])
