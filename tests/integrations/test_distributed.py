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


FEW = 50
"""Each of so many scenarios is in the fast part."""


def run_ranks(folder, stride):
    """How many scenarios each rank got through, and what failed."""
    logs = [open(folder / f"{rank}.log", "w") for rank in range(2)]
    started = [
        subprocess.Popen([sys.executable, SCRIPT, folder, *map(str, (rank, stride))], **both)
        for rank, both in enumerate({"stdout": log, "stderr": log} for log in logs)
    ]
    try:
        codes = [rank.wait(timeout=600) for rank in started]
    finally:
        for rank, log in zip(started, logs, strict=True):
            rank.kill()
            log.close()
    assert codes == [0, 0], (folder / "0.log").read_text() + (folder / "1.log").read_text()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_a_few_scenarios(tmp_path):
    for done, failures in run_ranks(tmp_path, FEW):
        assert done == (len(ranks.scenarios()) - 1) // FEW * FEW and not failures


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("ranks"), 1)


@pytest.mark.slow
@pytest.mark.parametrize("number, title", list(enumerate(ranks.scenarios())))
def test_as_torch(number, title, outcome):
    for rank, (done, failures) in enumerate(outcome):
        assert done >= number, f"rank {rank} stopped after {done}"
        assert title not in failures, f"rank {rank}:\n{failures[title]}"
