"""The plots of perf/README.md, drawn from results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from perf.tables import GONE

Results = dict[str, Any]
OPTIMIZERS = ("RMSprop", "Rprop")
COLOURS = {
    "for-loop": "C7", "foreach": "C1", "compiled": "C2", "tritonopt": "C3", "compile()": "C4",
    "backend": "C0", "tritonopt, replayed": "C6",
}  # fmt: skip


def _line(records: list[dict[str, Any]], optimizer: str, name: str) -> list[dict[str, Any]]:
    return [
        r
        for r in records
        if r.get("optimizer") == optimizer
        and r.get("implementation") == name
        and "missing" not in r
    ]


def _names(records: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(r["implementation"] for r in records if "missing" not in r))


def _lines(axes: Any, records: list[Any], optimizer: str, x: Any, y: Any) -> None:
    for name in _names(records):
        line = _line(records, optimizer, name)
        if line:  # an empty one could not be drawn to scale
            xs, ys = [x(r) for r in line], [y(r) for r in line]
            axes.plot(xs, ys, marker=".", label=name, color=COLOURS.get(name))
    scale = {"xscale": "log", "yscale": "log"} if axes.lines else {}
    axes.set(title=optimizer, **scale)
    axes.grid(alpha=0.3)


def _roofline(axes: Any, results: Results, optimizer: str) -> None:
    records = [r for r in results["curve"] if "missing" not in r]
    _lines(axes, results["curve"], optimizer, lambda r: r["elements"],
           lambda r: r["least_bytes"] / _microseconds(r) / 1e3)  # fmt: skip
    if records:
        roof = median(r["bandwidth_bytes_per_s"] for r in records) / 1e9
        axes.axhline(roof, color="black", linestyle="--", label="bandwidth")
    axes.set(xlabel="elements", ylabel="bytes of the floor / time, GB/s")


def _size(axes: Any, results: Results, optimizer: str) -> None:
    _lines(axes, results["curve"], optimizer, lambda r: r["elements"],
           lambda r: r["wall_us"]["median"])  # fmt: skip
    axes.set(xlabel="elements of one parameter", ylabel="step, us")


def _count(axes: Any, results: Results, optimizer: str) -> None:
    _lines(axes, results["counts"], optimizer, lambda r: r["tensors"],
           lambda r: r["wall_us"]["median"])  # fmt: skip
    axes.set(xlabel="parameters of 64 elements", ylabel="step, us")


def _compile(axes: Any, results: Results, optimizer: str) -> None:
    records = [r for r in results["compile"] if r.get("implementation") not in GONE]
    _lines(axes, records, optimizer, lambda r: r["tensors"],
           lambda r: r["first_step_s"])  # fmt: skip
    axes.set(xlabel="parameters", ylabel="first step, s")


def _microseconds(record: dict[str, Any]) -> float:
    return float((record["device_us"] or record["wall_us"])["median"])


PLOTS: dict[str, tuple[str, Callable[[Any, Results, str], None]]] = {
    "roofline": ("curve", _roofline),
    "size": ("curve", _size),
    "count": ("counts", _count),
    "compile": ("compile", _compile),
}


def names(stem: str, results: Results) -> list[str]:
    return [f"{stem}-{name}" for name, (part, _) in PLOTS.items() if part in results]


def draw(stem: str, results: Results, folder: Path) -> None:
    from matplotlib.figure import Figure

    for name, (part, panel) in PLOTS.items():
        if part in results:
            figure = Figure(figsize=(10, 4), layout="constrained")
            for axes, optimizer in zip(figure.subplots(1, 2), OPTIMIZERS, strict=True):
                panel(axes, results, optimizer)
            if axes.lines:
                axes.legend(fontsize="small")
            figure.savefig(folder / f"{stem}-{name}.png", dpi=80)
