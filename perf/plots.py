"""The plots of perf/README.md, drawn from results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from perf.tables import GONE, Results, taken

COLOURS = {
    "for-loop": "C7", "foreach": "C1", "compiled": "C2", "tritonopt": "C3", "compile()": "C4",
    "backend": "C0", "tritonopt, replayed": "C6",
}  # fmt: skip
Value = Callable[[dict[str, Any]], float]
PLOTS: dict[str, tuple[str, str, str, Value, str]] = {  # of a part: x with its label, and y
    "roofline": ("curve", "elements", "elements",
                 lambda r: r["least_bytes"] / taken(r) / 1e3, "bytes of the floor / time, GB/s"),
    "size": ("curve", "elements", "elements of one parameter",
             lambda r: r["wall_us"]["median"], "step, us"),
    "count": ("counts", "tensors", "parameters of 64 elements",
              lambda r: r["wall_us"]["median"], "step, us"),
    "compile": ("compile", "tensors", "parameters", lambda r: r["first_step_s"], "first step, s"),
}  # fmt: skip


def names(stem: str, results: Results) -> list[str]:
    return [f"{stem}-{name}" for name, (part, *_) in PLOTS.items() if part in results]


def draw(stem: str, results: Results, folder: Path) -> None:
    from matplotlib.figure import Figure

    for name, (part, key, x_label, y, y_label) in PLOTS.items():
        if part not in results:
            continue
        records = [r for r in results[part] if "missing" not in r]
        figure = Figure(figsize=(10, 4), layout="constrained")
        for axes, optimizer in zip(figure.subplots(1, 2), ("RMSprop", "Rprop"), strict=True):
            for label in dict.fromkeys(r["implementation"] for r in records):
                of = (optimizer, label)
                line = [r for r in records if (r["optimizer"], r["implementation"]) == of]
                if line and label not in GONE:  # an empty one could not be drawn to scale
                    axes.plot([r[key] for r in line], [y(r) for r in line], marker=".",
                              label=label, color=COLOURS.get(label))  # fmt: skip
            if axes.lines:
                axes.set(xscale="log", yscale="log")
            if name == "roofline" and records:
                roof = median(r["bandwidth_bytes_per_s"] for r in records) / 1e9
                axes.axhline(roof, color="black", linestyle="--", label="bandwidth")
            axes.set(title=optimizer, xlabel=x_label, ylabel=y_label)
            axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
        figure.savefig(folder / f"{stem}-{name}.png", dpi=80)
