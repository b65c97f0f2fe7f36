"""The sum of squares of scattered gradients, read through the table of addresses."""

import triton
import triton.language as tl


@triton.jit
def square_sum_kernel(table_ptr, programs_ptr, sums_ptr, TYPES: tl.constexpr, BLOCK: tl.constexpr):
    # A program stores its own sum: atomics would add in another order at every step.
    program = tl.load(programs_ptr + tl.program_id(0))
    row_ptr = table_ptr + (program >> 32) * 2
    start = (program & 0xFFFFFFFF) * BLOCK
    offs = tl.arange(0, BLOCK)
    left, grad = tl.load(row_ptr) - start, tl.load(row_ptr + 1)

    COMPUTE: tl.constexpr = tl.float64 if TYPES[0] == tl.float64 else tl.float32
    total = tl.zeros((), COMPUTE)
    if (grad != 0) & (grad % 16 == 0) & (left >= BLOCK):
        grad_ptr = tl.multiple_of(grad.to(tl.pointer_type(TYPES[0])), 16) + start
        values = tl.load(grad_ptr + offs).to(COMPUTE)
        total = tl.sum(values * values)
    elif grad != 0:
        mask = offs < tl.minimum(left, BLOCK).to(tl.int32)
        values = tl.load(grad.to(tl.pointer_type(TYPES[0])) + start + offs, mask, 0.0).to(COMPUTE)
        total = tl.sum(values * values)
    tl.store(sums_ptr + tl.program_id(0), total)
