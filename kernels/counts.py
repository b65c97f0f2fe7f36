"""How many elements of each tensor a mask has, of what `update` has counted in each block."""

import triton
import triton.language as tl


@triton.jit
def count_sum_kernel(
    table_ptr, programs_ptr, counts_ptr, sums_ptr, WIDTH: tl.constexpr,
    TYPES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # The program of a tensor's first block adds up the others, which follow it: always in the same
    # order, and without atomics. What is added up are whole numbers, exact in fp64.
    index = tl.program_id(0)
    program = tl.load(programs_ptr + index)
    if (program & 0xFFFFFFFF) == 0:
        numel = tl.load(table_ptr + (program >> 32) * WIDTH)
        blocks = ((numel + BLOCK - 1) // BLOCK).to(tl.int32)
        offs = tl.arange(0, BLOCK)
        totals = tl.zeros((BLOCK,), tl.float64)
        first = 0
        while first < blocks:
            counts = tl.load(counts_ptr + index + first + offs, offs < blocks - first, 0.0)
            totals += counts.to(tl.float64)
            first += BLOCK
        tl.store(sums_ptr + (program >> 32), tl.sum(totals))
