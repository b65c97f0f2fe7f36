"""Half precision on the device. Read beside `tritonopt/precision.py`, which says what it is for."""

import triton
import triton.language as tl


@triton.jit
def joined(high, low):
    """The fp32 of two halves, bf16 as fp32 and int16."""
    bits = high.to(tl.int32, bitcast=True)
    low = low.to(tl.int32)
    low = tl.where((bits & 0x7FFFFFFF) == 0, tl.maximum(low, 0), low)
    return (bits + low).to(tl.float32, bitcast=True)


@triton.jit
def split(x):
    """The two halves of fp32."""
    bits = x.to(tl.int32, bitcast=True)
    high = tl.where(x == x, (bits + 0x8000) & -0x10000, 0x7FC00000)  # of NaN, all may be 1
    low = tl.where(x == x, bits - high, 0)
    return high.to(tl.float32, bitcast=True), low.to(tl.int16)


@triton.jit
def rounded(x, key, at, COLUMN: tl.constexpr):
    """Fp32 to one of two neighbours in bf16, by 16 random bits an element.

    `at`: the counter of every eight elements."""
    zero = at.to(tl.uint32) * 0
    first, second, third, fourth = tl.philox(
        key, at.to(tl.uint32), (at >> 32).to(tl.uint32), zero + COLUMN, zero
    )
    words = tl.join(tl.join(first, third), tl.join(second, fourth))
    random = tl.join(words & 0xFFFF, words >> 16).reshape(x.shape)
    noisy = (x.to(tl.int32, bitcast=True) + random.to(tl.int32)) & -0x10000
    return tl.where(x == x, noisy.to(tl.float32, bitcast=True), x)  # of NaN, all bits may be 1
