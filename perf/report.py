"""Puts the figures of perf/results/*.json into the README, as tables and plots.

    python -m perf.report [--check]

A block of the README between `<!-- perf:cpu steps -->` and `<!-- /perf -->` is the table of one
part, or of all parts and plots. With --check nothing is written, and the exit code is 1 if the
README says something else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from perf import plots
from perf.tables import TABLES, tables

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- perf:(\w+) (\w+) -->\n).*?(<!-- /perf -->)", re.S)


class Unreadable(Exception):
    """A file of results that is none."""


def read(file: Path) -> dict[str, Any]:
    try:
        results = json.loads(file.read_text())
        results["machine"], results["quick"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Unreadable(f"{file} holds no results: {type(error).__name__}: {error}") from error
    return dict(results)


def block(file: Path, part: str) -> Iterator[str]:
    """What the README says of one part of the results in a file."""
    results = read(file)
    if part == "all":
        yield from tables(results)
    elif part in results:
        yield TABLES[part](results)
    if part in ("all", "plots"):
        pictures = plots.names(file.stem, results)
        yield "\n".join(f"![{name}](perf/results/{name}.png)" for name in pictures)


def readme(text: str, folder: Path) -> str:
    """The README with all of its blocks made again."""
    cpu = folder / "cpu.json"
    others = sorted(file for file in folder.glob("*.json") if file != cpu)

    def replace(match: re.Match[str]) -> str:
        files = [cpu] if match[2] == "cpu" else others
        texts = [text for file in files for text in block(file, match[3])]
        lacking = "Not measured on a GPU yet." if match[2] == "gpu" else "Not measured."
        body = "\n\n".join(texts) or lacking
        return f"{match[1]}\n{body}\n\n{match[4]}"

    return BLOCK.sub(replace, text)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    if not check and importlib.util.find_spec("matplotlib") is None:
        print('perf.report draws with matplotlib: pip install -e ".[perf]"')
        return 2
    file, folder = root / "README.md", root / "perf" / "results"
    text = file.read_text()
    try:
        made = readme(text, folder)
    except Unreadable as why:
        print(why)
        return 2
    if check:
        pictures = re.findall(r"\]\((perf/results/[^)]+\.png)\)", made)
        lacking = [name for name in pictures if not (root / name).exists()]
        if made != text or lacking:
            print("README.md differs from perf/results: run python -m perf.report", *lacking)
            return 1
        return 0
    file.write_text(made)
    for results in folder.glob("*.json"):
        plots.draw(results.stem, read(results), folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
