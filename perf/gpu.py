"""Everything that a GPU can tell, in under 8 minutes: `python -m perf.gpu --out perf/results`

It reads the GPU's clocks and changes none of its settings.
"""

from __future__ import annotations

import sys

from perf import plan
from perf.machine import accelerator, usable_device

if __name__ == "__main__":
    parser = plan.parser(__doc__, gpu=True)
    parser.add_argument("--device", type=usable_device, default=accelerator(),
                        help="cpu tries out what this script does, without a GPU")  # fmt: skip
    options = parser.parse_args()
    if options.device is None:
        print("perf.gpu needs a GPU that this torch can use; python -m perf.cpu measures the CPU")
        sys.exit(2)
    sys.exit(plan.main(options.device, gpu=True, options=options))
