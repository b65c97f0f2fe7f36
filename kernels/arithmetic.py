"""Square root and division rounded to nearest, as IEEE 754 and torch's eager operators do."""

import triton
import triton.language as tl


@triton.jit
def sqrt_rn(x):
    if x.dtype == tl.float64:  # tl.sqrt_rn takes fp32 only; fp64 is always rounded to nearest
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def div_rn(x, y):
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)
