"""Puts the figures of perf/results/*.json into README.md and perf/README.md, and draws the plots.

    python -m perf.report [--check]

Between `<!-- perf:cpu steps -->` and `<!-- /perf -->` stands the table of one part; `summary` is
the short table, `all` is all tables and plots. With --check nothing is written, and the exit code
is 1 if one of the files says something else.
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
from perf.tables import table, tables

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
    """What is said of one part of the results in a file."""
    results = read(file)
    if part == "all":
        yield from tables(results)
    elif part != "plots":
        yield table(results, part)
    if part in ("all", "plots"):
        yield "\n".join(f"![{n}](results/{n}.png)" for n in plots.names(file.stem, results))


def fill(text: str, folder: Path) -> str:
    """A text with all of its blocks made again."""
    cpu = folder / "cpu.json"
    others = sorted(file for file in folder.glob("*.json") if file != cpu)

    def replace(match: re.Match[str]) -> str:
        files = [cpu] if match[2] == "cpu" else others
        texts = [text for file in files for text in block(file, match[3]) if text]
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
    folder = root / "perf" / "results"
    files = [root / "README.md", root / "perf" / "README.md"]
    try:
        made = {file: fill(file.read_text(), folder) for file in files}
    except Unreadable as why:
        print(why)
        return 2
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
    for results in folder.glob("*.json"):
        plots.draw(results.stem, read(results), folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
