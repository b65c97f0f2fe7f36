"""What does the host do per step and parameter on the kernel path, before and without the launch?

    TRITON_INTERPRET=1 python -m perf.host

Tensors lie on the CPU and the launch itself is replaced by nothing: what remains is the gathering
and comparing of addresses, the table's look-up, the step counters and the version counters.
"""

from __future__ import annotations

import sys
import time
from statistics import median

import torch

import tritonopt
from tritonopt.device import INTERPRET


def host_time(name: str, count: int) -> float:
    """Seconds of a step over `count` parameters of 64 elements."""
    params = [torch.nn.Parameter(torch.randn(64)) for _ in range(count)]
    optimizer = getattr(tritonopt, name)(params)
    for param in params:
        param.grad = torch.randn_like(param)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for layout in optimizer._layouts.values():
        for bucket in layout.buckets:
            bucket.update.rule = lambda *args, **kwargs: None
    times = []
    for _ in range(60):
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return median(times[10:])


def main() -> int:
    if not INTERPRET:
        print("set TRITON_INTERPRET=1: it sends CPU tensors down the kernel path")
        return 2
    for name in ("RMSprop", "Rprop"):
        few, many = host_time(name, 100), host_time(name, 2100)
        each = (many - few) / 2000
        print(f"{name}: {each * 1e6:.2f} us per parameter and {(few - 100 * each) * 1e6:.0f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
