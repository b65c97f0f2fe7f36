"""The code about Lightning, distributed training and Hugging Face runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README_ecosystem.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for library in ("lightning", "transformers"):
        if f"import {library}" in BLOCKS[number] or f"from {library}" in BLOCKS[number]:
            pytest.importorskip(library)
    exec(BLOCKS[number], {"__name__": "readme"})
