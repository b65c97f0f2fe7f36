"""Half precision on the device. Read beside `tritonopt/precision.py`, which says what it is for."""

import triton
import triton.language as tl


@triton.jit
def joined(high, low):
    """The fp32 of two halves, bf16 as fp32 and int16."""
    bits = high.to(tl.int32, bitcast=True)
    low = low.to(tl.uint16, bitcast=True).to(tl.int32) ^ 0x8000  # what is signed, plus 2^15
    magnitude = tl.maximum((bits & 0x7FFFFFFF) - 0x8000 + low, 0)
    return (bits & -0x80000000 | magnitude).to(tl.float32, bitcast=True)


@triton.jit
def split(x):
    """The two halves of fp32."""
    bits = x.to(tl.int32, bitcast=True)
    high = tl.where(x == x, (bits + 0x8000) & -0x10000, 0x7FC00000)  # of NaN, all may be 1
    low = tl.where(x == x, bits - high, 0)
    return high.to(tl.float32, bitcast=True), low.to(tl.int16)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Of uint32. Triton's own takes two multiplications where this takes a wide one."""
    for _ in tl.static_range(10):
        left, right = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (right >> 32).to(tl.uint32) ^ c1 ^ k0, right.to(tl.uint32)
        c2, c3 = (left >> 32).to(tl.uint32) ^ c3 ^ k1, left.to(tl.uint32)
        k0, k1 = k0 + tl.cast(0x9E3779B9, tl.uint32), k1 + tl.cast(0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def random(key, origin, offs, COLUMN: tl.constexpr):
    """16 random bits an element."""
    # Eight elements share four words. On the aligned path they are a thread's own, of which the
    # compiler sees that they share them.
    at, number = origin + (offs >> 3), offs & 7
    lower, upper = at.to(tl.uint32), (at >> 32).to(tl.uint32)
    zero = lower * 0
    first, second, third, fourth = philox(
        lower, upper, zero + COLUMN, zero, key.to(tl.uint32), (key >> 32).to(tl.uint32)
    )
    word = tl.where(number < 2, first, tl.where(number < 4, second, third))
    word = tl.where(number < 6, word, fourth)
    return tl.where((number & 1) == 0, word & 0xFFFF, word >> 16).to(tl.int32, bitcast=True)


@triton.jit
def rounded(x, noise):
    """Fp32 to one of two neighbours in bf16."""
    noisy = (x.to(tl.int32, bitcast=True) + noise) & -0x10000
    return tl.where(x == x, noisy.to(tl.float32, bitcast=True), x)  # of NaN, all bits may be 1
