"""Two gloo processes: each scenario of `ranks.py` equals torch's run to the last bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch

from tritonopt.device import INTERPRET

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
    pytest.mark.skipif(INTERPRET, reason="the interpreter rounds torch's square root otherwise"),
]
SCRIPT = Path(ranks.__file__)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """How many scenarios each rank got through, and what failed."""
    folder = tmp_path_factory.mktemp("ranks")
    logs = [open(folder / f"{rank}.log", "w") for rank in range(2)]
    started = [
        subprocess.Popen([sys.executable, SCRIPT, folder, str(rank)], stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [rank.wait(timeout=240) for rank in started]
    finally:
        for rank, log in zip(started, logs, strict=True):
            rank.kill()
            log.close()
    assert codes == [0, 0], (folder / "0.log").read_text() + (folder / "1.log").read_text()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("number, title", list(enumerate(ranks.scenarios())))
def test_as_torch(number, title, outcome):
    for rank, (done, failures) in enumerate(outcome):
        assert done >= number, f"rank {rank} stopped after {done}"
        assert title not in failures, f"rank {rank}:\n{failures[title]}"
