"""The plots of perf/README.md, drawn from results: how near to the floor steps of all sizes are."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from perf.implementations import IMPLEMENTATIONS, RULES
from perf.tables import Results, implementations, measured, rate

COLOURS = {name: f"C{number}" for number, name in enumerate(IMPLEMENTATIONS)}
PLOTS = {  # what is drawn over the elements of one parameter
    "roofline": ("bytes of the floor / time, GB/s", rate),
    "size": ("step, us", lambda record: record["wall_us"]["median"]),
}


def names(stem: str, results: Results) -> list[str]:
    return [f"{stem}-{name}" for name in PLOTS] if measured(results, "curve") else []


def draw(stem: str, results: Results, folder: Path) -> None:
    from matplotlib.figure import Figure

    records = sorted(measured(results, "curve"), key=lambda record: record["elements"])
    if not records:
        return
    for name, (label, value) in PLOTS.items():
        figure = Figure(figsize=(10, 4), layout="constrained")
        for axes, optimizer in zip(figure.subplots(1, 2), RULES, strict=True):
            some = [record for record in records if record["optimizer"] == optimizer]
            for implementation in implementations(some):
                line = [record for record in some if record["implementation"] == implementation]
                axes.loglog([r["elements"] for r in line], [value(r) for r in line], marker=".",
                            label=implementation, color=COLOURS[implementation])  # fmt: skip
            if name == "roofline":
                roof = median(record["bandwidth_bytes_per_s"] for record in records) / 1e9
                axes.axhline(roof, color="black", linestyle="--", label="bandwidth")
            axes.set(title=optimizer, xlabel="elements of one parameter", ylabel=label)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        figure.savefig(folder / f"{stem}-{name}.png", dpi=80)
