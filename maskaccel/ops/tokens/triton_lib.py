"""Device functions of the token kernels: random words, ranking keys, the m-th smallest key, fp8. Needs triton.

Keys are non-negative int64, all different within a row, and the smallest are taken.
"""

from __future__ import annotations

import triton
import triton.language as tl

MUL0, MUL1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)  # of counter words 0 and 2
WEYL0, WEYL1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)  # what the key words grow by
NO_KEY = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def random_word(item, stream, b):
    """First word of Philox 4x32-10 for each item (uint32), of sample `b` in `stream`.

    `stream` is (both key words, number of sample 0, pointer to the step, route with purpose), words as int32.
    """
    word: tl.constexpr = tl.uint32
    a = tl.full([], MUL0, word)
    c = tl.full([], MUL1, word)
    k0 = stream[0].to(word, bitcast=True)
    k1 = stream[1].to(word, bitcast=True)
    step = (tl.load(stream[3]) & 0xFFFFFFFF).to(word)
    zero = item ^ item
    c0 = item
    c1 = zero + (stream[2].to(word, bitcast=True) + b.to(word))
    c2 = zero + step
    c3 = zero + stream[4].to(word, bitcast=True)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, zero + a)
        high1 = tl.umulhi(c2, zero + c)
        low0 = c0 * a
        low1 = c2 * c
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = k0 + tl.full([], WEYL0, word)
        k1 = k1 + tl.full([], WEYL1, word)
    return c0


@triton.jit
def gumbel(word):
    """Gumbel noise of random words; the uniform number is exact in fp32 and never 0 or 1."""
    u = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(u))


@triton.jit
def falling_key(v):
    """int64 in [0, 2^32) that falls as the fp32 `v` rises, 0.0 and -0.0 alike; `v` is no NaN."""
    bits = tl.where(v == 0.0, 0.0, v).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits, ~bits & 0x7FFFFFFF)
    return key.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def load_keys(keys, labels, wanted, row, rows, lanes, count):
    """Keys of a block; NO_KEY outside of the row and where the label is not the wanted one."""
    inside = rows & (lanes < count)
    k = tl.load(keys + row + lanes, mask=inside, other=NO_KEY)
    if labels is not None:
        k = tl.where(tl.load(labels + lanes, mask=inside, other=-1) == wanted, k, NO_KEY)
    return k


@triton.jit
def mth_smallest(keys, labels, wanted, row, rows, count, m, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                 WHOLE: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """For each of ROWS rows of `count` keys below 2^BITS the m-th smallest one `(ROWS, 1)`; -1 for m <= 0.

    Where fewer keys have the label, a number above all of them. Two bits are found at a time, by counting the keys
    below three numbers; a row of at most BLOCK keys (WHOLE) is loaded once, a longer one again for each pair of bits.
    """
    lanes = tl.arange(0, BLOCK)[None, :]
    found = tl.zeros([ROWS, 1], tl.int64)
    if WHOLE:
        k = load_keys(keys, labels, wanted, row, rows, lanes, count)
    for i in range((BITS + 1) // 2):
        unit = tl.full([ROWS, 1], 1, tl.int64) << 2 * ((BITS + 1) // 2 - 1 - i)
        if WHOLE:
            one = tl.sum((k < found + unit).to(tl.int32), 1)[:, None]
            two = tl.sum((k < found + 2 * unit).to(tl.int32), 1)[:, None]
            three = tl.sum((k < found + 3 * unit).to(tl.int32), 1)[:, None]
        else:
            ones = tl.zeros([ROWS, BLOCK], tl.int32)
            twos = ones
            threes = ones
            for start in range(0, count, BLOCK):
                part = load_keys(keys, labels, wanted, row, rows, start + lanes, count)
                ones += (part < found + unit).to(tl.int32)
                twos += (part < found + 2 * unit).to(tl.int32)
                threes += (part < found + 3 * unit).to(tl.int32)
            one = tl.sum(ones, 1)[:, None]
            two = tl.sum(twos, 1)[:, None]
            three = tl.sum(threes, 1)[:, None]
        digit = (one < m).to(tl.int64) + (two < m).to(tl.int64) + (three < m).to(tl.int64)
        found += digit * unit
    return tl.where(m > 0, found, -1)


@triton.jit
def to_e4m3(v):
    """Bits of fp8 e4m3fn of an fp32 of magnitude 448 or less, to the nearest even; NaN stays one. For any GPU."""
    bits = v.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # exponent bias 7 in place of 127
    # below 2^-6 steps are 2^-9, which is the unit in the last place of 2^14
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(size < 0x3C800000, small, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def from_e4m3(code):
    """The fp32 value of the bits of an fp8 e4m3fn."""
    c = code.to(tl.int32)
    size = c & 0x7F
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    value = tl.where(size == 0x7F, float("nan"), value)
    return tl.where(c >= 0x80, -value, value)
