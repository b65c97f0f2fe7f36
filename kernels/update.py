"""What all rules share: which elements a program updates, and how it reads and writes them.

A rule gets one value of the parameter, the gradient and each state, and then arguments of its own;
it returns the parameter's and each state's new value.
"""

import triton
import triton.language as tl

from tritonopt.kernels.arithmetic import INTERPRETED
from tritonopt.kernels.precision import joined, random, rounded, split
from tritonopt.kernels.quantized import BLOCK as SCALED
from tritonopt.kernels.quantized import decoded, encoded, of_blocks

PIECES: tl.constexpr = tl.constexpr(1 if INTERPRETED.value else 4)
"""In which a masked block is updated, one after the other: else it takes 72 registers a thread in
place of 48 (more of them in README.md). The interpreter is slower the more pieces there are."""
AT_RANDOM: tl.constexpr = tl.constexpr(tl.uint16)
"""In the place of bf16 among TYPES, where it is rounded by random bits."""


@triton.jit
def update(
    table_ptr, programs_ptr, factor_ptr, skip_ptr, noise_ptr, RULE: tl.constexpr, arguments,
    TYPES: tl.constexpr, BLOCK: tl.constexpr, counts_ptr=None,
):  # fmt: skip
    """Up to BLOCK elements of one tensor. TYPES: of what the addresses in a row are of; where the
    last is int16, it holds the lower halves of the parameter; where the first state is uint8, the
    last but for that holds its scales; AT_RANDOM stands for bf16. With counts, nothing is updated:
    the rule returns a mask in the parameter's place, of which the sum is stored."""
    # A row of the table: numel, the addresses of gradient, parameter and states; 0 where there is
    # no gradient, or no such state. With noise, also where the tensor's counters begin.
    WIDTH: tl.constexpr = len(TYPES) + (1 if noise_ptr is None else 2)
    program = tl.load(programs_ptr + tl.program_id(0))
    row_ptr = table_ptr + (program >> 32) * WIDTH
    start = (program & 0xFFFFFFFF) * BLOCK
    left = tl.load(row_ptr) - start
    addresses, bits = (), 0
    for column in tl.static_range(len(TYPES)):
        addresses = addresses + (tl.load(row_ptr + 1 + column),)
        if column != scales_in(TYPES):
            bits = bits | addresses[column]
    present = addresses[0] != 0
    if skip_ptr is not None:
        present = present & (tl.load(skip_ptr) == 0)
    noise = None
    if noise_ptr is not None:
        noise = tl.load(noise_ptr + (program >> 32)), tl.load(row_ptr + WIDTH - 1)

    count = 0.0
    # A mask whose bound may not divide by 16 makes every access scalar, hence two paths. The one
    # with a mask takes few elements at a time: else it would raise the registers of both.
    if present & (bits % 16 == 0) & (left >= BLOCK):
        count = piece(
            addresses, start, BLOCK, None, 16, factor_ptr, noise,
            RULE, arguments, TYPES, counts_ptr is not None,
        )  # fmt: skip
    elif present:
        offs = tl.arange(0, BLOCK // PIECES)
        end = tl.minimum(left, BLOCK).to(tl.int32)
        first = 0
        while first < end:  # not a range, which triton 3.6 cannot interpret with numpy 2.4
            mask = offs < end - first
            count += piece(
                addresses, start + first, BLOCK // PIECES, mask, 1, factor_ptr, noise,
                RULE, arguments, TYPES, counts_ptr is not None,
            )  # fmt: skip
            first += BLOCK // PIECES
    if counts_ptr is not None:
        tl.store(counts_ptr + tl.program_id(0), count)


@triton.jit
def piece(
    addresses, start, NUMEL: tl.constexpr, mask, ALIGNMENT: tl.constexpr,
    factor_ptr, noise, RULE: tl.constexpr, arguments, TYPES: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, NUMEL)
    COMPUTE: tl.constexpr = tl.float64 if TYPES[1] == tl.float64 else tl.float32
    ptrs, values, scaled = (), (), None
    if scales_in(TYPES) > 0 and mask is not None and NUMEL > SCALED:
        scaled = of_blocks(mask, NUMEL)
    for column in tl.static_range(len(TYPES)):
        if TYPES[column] is None:  # whatever: triton 3.6 cannot return None
            ptrs, values = ptrs + (offs,), values + (values[0],)
        elif column == scales_in(TYPES):
            ptr = addresses[column].to(tl.pointer_type(TYPES[column]))
            ptrs = ptrs + (ptr + start // SCALED + tl.arange(0, NUMEL // SCALED),)
            values = values + (tl.load(ptrs[column], scaled),)
        else:
            ptr = addresses[column].to(tl.pointer_type(in_memory(TYPES[column])))
            ptrs = ptrs + (tl.multiple_of(ptr, ALIGNMENT) + start + offs,)
            value = tl.load(ptrs[column], mask)
            if in_memory(TYPES[column]).is_floating():
                value = value.to(COMPUTE)
            values = values + (value,)
    grad = values[0]
    if factor_ptr is not None:
        grad = grad * tl.load(factor_ptr).to(COMPUTE)

    param, states = values[1], values[2:]
    if is_split(TYPES):
        param, states = joined(param, states[-1]), states[:-1]
    if scales_in(TYPES) > 0:
        states = (decoded(states[0], states[-1], NUMEL),) + states[1:-1]
    values = RULE(param, grad, *states, *arguments)
    mask_of_rule = values[0]
    if scales_in(TYPES) > 0:
        drawn = random(noise[0], noise[1] + (start >> 3), offs, 1)
        code, scale = encoded(values[1], mask, drawn, NUMEL)
        values = (values[0], code) + values[2:] + (scale,)
    if is_split(TYPES):
        high, low = split(values[0])
        values = (high,) + values[1:] + (low,)
    if COUNTS:
        counted = mask_of_rule > 0
        if mask is not None:
            counted = counted & mask
        count = tl.sum(counted.to(tl.float32))  # exact
    else:
        store(ptrs, values, start, offs, mask, scaled, noise, TYPES)
        count = 0.0
    return count


@triton.jit
def store(ptrs, values, start, offs, mask, scaled, noise, TYPES: tl.constexpr):
    if differ(TYPES):  # then a thread may store other elements of a tensor than it has loaded
        tl.debug_barrier()
    for column in tl.static_range(1, len(TYPES)):
        if TYPES[column] is not None:
            value = values[column - 1]
            if TYPES[column] == AT_RANDOM:
                origin = noise[1] + (start >> 3)
                value = rounded(value, random(noise[0], origin, offs, column - 1))
            tl.store(ptrs[column], value, scaled if column == scales_in(TYPES) else mask)


@triton.constexpr_function
def scales_in(types):
    """Which column has scales; -1: none."""
    if len(types) < 3 or types[2] != tl.uint8:
        return -1
    return len(types) - (2 if is_split(types) else 1)


@triton.constexpr_function
def in_memory(kind):
    return tl.bfloat16 if kind == AT_RANDOM else kind


@triton.constexpr_function
def is_split(types):
    return types[-1] is not None and types[-1] == tl.int16


@triton.constexpr_function
def differ(types):
    return len({in_memory(kind) for kind in types} - {None}) > 1
