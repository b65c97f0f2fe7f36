"""Everything that the README says of a CPU, in one run: `python -m perf.cpu --out perf/results`"""

from __future__ import annotations

import sys

import torch

from perf import plan

if __name__ == "__main__":
    options = plan.parser(__doc__, gpu=False).parse_args()
    sys.exit(plan.main(torch.device("cpu"), gpu=False, options=options))
