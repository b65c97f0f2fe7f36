"""Puts the figures of perf/results/*.json into README.md and perf/README.md, and draws the plots.

    python -m perf.report [--check]

Between `<!-- perf:cpu steps -->` and `<!-- /perf -->` stands the table of one part; `summary` is
the short table, `all` is all tables and plots. With --check nothing is written, and the exit code
is 1 if one of the files says something else.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from perf.implementations import IMPLEMENTATIONS, RULES
from perf.tables import (
    Record,
    Results,
    implementations,
    measured,
    precision,
    rate,
    table,
    tables,
    unique,
)

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- perf:(\w+) (\w+) -->\n).*?(<!-- /perf -->)", re.S)
COLOURS = {name: f"C{number}" for number, name in enumerate(IMPLEMENTATIONS)}
OWN = ("cpu", "options", "bf16")  # files of results with a name of their own
PLOTS = {  # what is drawn over the elements of one parameter
    "roofline": ("bytes of the floor / time, GB/s", rate),
    "size": ("step, us", lambda record: record["wall_us"]["median"]),
}


def draw_losses(records: list[Record], file: Path) -> None:
    labels = unique(records, "optimizer")
    figure = Figure(figsize=(5 * len(labels), 4), layout="constrained")
    for axes, label in zip(figure.subplots(1, len(labels), squeeze=False)[0], labels, strict=True):
        for record in (record for record in records if record["optimizer"] == label):
            of = record["losses"]
            at = [record["steps"] * number / (len(of) - 1) for number in range(len(of))]
            style = dict(color="black", ls="--") if "32" in record["dtype"] else {}
            axes.semilogy(at, of, label=precision(record), **style)
        axes.set(title=label, xlabel="step", ylabel="loss over all digits")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=80)


def draw(file: Path) -> None:
    """How near to the floor steps over one parameter are, and how long they take."""
    results = json.loads(file.read_text())
    if trainings := measured(results, "bf16"):
        draw_losses(trainings, file.with_suffix(".png"))
    records = sorted(measured(results, "curve"), key=lambda record: record["elements"])
    if not records:
        return
    for name, (label, value) in PLOTS.items():
        figure = Figure(figsize=(10, 4), layout="constrained")
        for axes, rule in zip(figure.subplots(1, 2), RULES, strict=True):
            some = [record for record in records if record["optimizer"] == rule]
            for implementation in implementations(some):
                line = [record for record in some if record["implementation"] == implementation]
                axes.loglog([r["elements"] for r in line], [value(r) for r in line], marker=".",
                            label=implementation, color=COLOURS[implementation])  # fmt: skip
            if name == "roofline":
                roof = median(record["bandwidth_bytes_per_s"] for record in records) / 1e9
                axes.axhline(roof, color="black", linestyle="--", label="bandwidth")
            axes.set(title=rule, xlabel="elements of one parameter", ylabel=label)
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(fontsize="small")
        figure.savefig(plot(file, name), dpi=80)


def plot(file: Path, name: str) -> Path:
    return file.with_name(f"{file.stem}-{name}.png")


def block(file: Path, part: str) -> Iterator[str]:
    """What is said of one part of the results in a file."""
    results: Results = json.loads(file.read_text())
    if part == "all":
        yield from tables(results)
    elif part != "plots":
        yield table(results, part)
    if part in ("all", "plots") and measured(results, "curve"):
        plots = [plot(file, name) for name in PLOTS]
        yield "\n".join(f"![{one.stem}](results/{one.name})" for one in plots)


def fill(text: str, folder: Path) -> str:
    """A text with all of its blocks made again."""
    files = sorted(folder.glob("*.json"))

    def replace(match: re.Match[str]) -> str:
        some = [file for file in files if (file.stem if file.stem in OWN else "gpu") == match[2]]
        texts = [text for file in some for text in block(file, match[3]) if text]
        lacking = "Not measured on a GPU yet." if match[2] == "gpu" else "Not measured."
        body = "\n\n".join(texts) or lacking
        return f"{match[1]}\n{body}\n\n{match[4]}"

    return BLOCK.sub(replace, text)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    folder = root / "perf" / "results"
    files = [root / "README.md", root / "perf" / "README.md"]
    made = {file: fill(file.read_text(), folder) for file in files}
    if check:
        pictures = re.findall(r"\]\((results/[^)]+\.png)\)", made[files[1]])
        lacking = [name for name in pictures if not (root / "perf" / name).exists()]
        other = [str(file.relative_to(root)) for file in files if made[file] != file.read_text()]
        if other or lacking:
            print("Not what perf/results says: run python -m perf.report:", *other, *lacking)
            return 1
        return 0
    for file in files:
        file.write_text(made[file])
    for file in folder.glob("*.json"):
        draw(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
