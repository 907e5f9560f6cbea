"""Device functions of the Triton attention kernels. Importing this needs triton.

Operands travel as tuples: `rows` of q, k, v or a gradient are (pointer, batch, row and head stride, each divided by
ALIGN), `lists` (index, count, entries of a row, batch and head stride in rows), `elements` (pattern_of, patterns, batch
and head stride in tiles), `bias` (pointer and its four strides), `relpos` (table, head stride, relpos_q, batch stride,
relpos_k, batch stride). An absent one is None.

A head dim D is cut in two parts: D1, a power of two, and D2, 0 or a power of two that holds the rest (72 = 64 + 8,
padded to 16, the least that a dot takes). Tiles of rows are pairs of these parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


@triton.jit
def place(order, rows, group, heads, b_copies, M, PARTS: tl.constexpr):
    """(batch, head, row of tiles, part of it) of this program, for 1-D grids of rows * PARTS * copies.

    A mask row serves `copies` pairs of batch and head. Those go in groups whose keys and values fit into L2; within a
    group the rows with most tiles come first, for all pairs, and the parts of one row are neighbours.
    `heads` is (heads of the mask, heads that share one of them).
    """
    p = tl.program_id(0)
    copies = b_copies * heads[1]
    section = p // (rows * PARTS * group)
    left = p - section * rows * PARTS * group
    size = tl.minimum(group, copies - section * group)
    rank = left // (PARTS * size)
    left -= rank * PARTS * size
    flat = rank
    if order is not None:
        flat = tl.load(order + rank)
    copy = section * group + left // PARTS
    lead = flat // M
    batch = lead // heads[0] + copy // heads[1]
    head = lead % heads[0] + copy % heads[1]
    return batch.to(tl.int64), head.to(tl.int64), flat % M, left % PARTS


@triton.jit
def list_of(lists, b, h, m, M, NO_LISTS):
    """(index, number of partial tiles, number of full ones) of a row of tiles; without lists all tiles are full."""
    if lists is None:
        return None, 0, NO_LISTS
    else:
        row = b * lists[3] + h * lists[4] + m
        count = lists[1] + 2 * row
        return lists[0] + row * lists[2], tl.load(count), tl.load(count + 1)


@triton.jit
def phases(lists, b, h, m, M, Nk, inside, RAGGED: tl.constexpr):
    """(index, partial tiles, full tiles, 0 or 1 full tile that reaches past the keys, the last one of the list).

    Nothing where `inside` is false: the last row of tiles may have parts without a query.
    """
    index, partial, full = list_of(lists, b, h, m, M, Nk)
    partial = tl.where(inside, partial, 0)
    full = tl.where(inside, full, 0)
    if RAGGED:  # full tiles are ascending
        last = Nk - 1
        if index is not None:
            last = tl.load(index + partial + full - 1, mask=full > 0, other=0)
        ragged = ((full > 0) & (last == Nk - 1)).to(tl.int32)
        return index, partial, full - ragged, ragged
    else:
        return index, partial, full, 0


@triton.jit
def head_of(operand, b, h, ALIGN: tl.constexpr):
    """Pointer to row 0 of a head."""
    return operand[0] + b * (operand[1] * ALIGN) + h * (operand[3] * ALIGN)


@triton.jit
def load_part(pointer, stride, rows, limit, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
              BOUND: tl.constexpr):  # fmt: skip
    """Columns FIRST to FIRST + WIDTH of some rows; zeros past D, and with BOUND in rows from `limit` on."""
    cols = FIRST + tl.arange(0, WIDTH)
    at = pointer + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if FIRST + WIDTH > D:
        mask = (cols < D)[None, :]
        if BOUND:
            mask = mask & (rows < limit)[:, None]
        part = tl.load(at, mask=mask, other=0.0)
    elif BOUND:
        part = tl.load(at, mask=(rows < limit)[:, None], other=0.0)
    else:
        part = tl.load(at)
    return part


@triton.jit
def load_rows(pointer, stride, rows, limit, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BOUND: tl.constexpr):
    """Both parts of some rows of a head; without a second part the first one twice."""
    one = load_part(pointer, stride, rows, limit, D, 0, D1, BOUND)
    if D2 == 0:
        return one, one
    else:
        return one, load_part(pointer, stride, rows, limit, D, D1, D2, BOUND)


@triton.jit
def store_rows(pointer, stride, rows, limit, one, two, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    cols = tl.arange(0, D1)
    at = pointer + rows.to(tl.int64)[:, None] * stride
    keep = (rows < limit)[:, None]
    tl.store(at + cols[None, :], one.to(pointer.dtype.element_ty), mask=keep & (cols < D)[None, :])
    if D2 > 0:
        cols = D1 + tl.arange(0, D2)
        tl.store(at + cols[None, :], two.to(pointer.dtype.element_ty), mask=keep & (cols < D)[None, :])


@triton.jit
def dot(a, b, out, PRECISION: tl.constexpr):
    """Accumulate a @ b on `out`, fp32. PRECISION None: Triton's interpreter, which takes bf16 for integers in a dot."""
    if PRECISION is None:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), out, input_precision="ieee")
    else:
        return tl.dot(a, b, out, input_precision=PRECISION)


@triton.jit
def products(a1, a2, b1, b2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """The inner products of the rows of a with the rows of b, fp32."""
    out = tl.zeros([a1.shape[0], b1.shape[0]], tl.float32)
    out = dot(a1, tl.trans(b1), out, PRECISION)
    if D2 > 0:
        out = dot(a2, tl.trans(b2), out, PRECISION)
    return out


@triton.jit
def add_products(out1, out2, weights, b1, b2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """(out1, out2) + weights @ (b1, b2), with the weights rounded to the dtype of b."""
    weights = weights.to(b1.dtype)
    out1 = dot(weights, b1, out1, PRECISION)
    if D2 > 0:
        out2 = dot(weights, b2, out2, PRECISION)
    return out1, out2


@triton.jit
def with_bias(s, i, j, bias, relpos, b, h, Sq, Sk):
    """Scores in units of log2 plus bias and relative position term; `i` and `j` broadcast to the tile."""
    inside = (i < Sq) & (j < Sk)
    if bias is not None:
        at = bias[0] + b * bias[1] + h * bias[2] + i.to(tl.int64) * bias[3] + j.to(tl.int64) * bias[4]
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32) * LOG2E
    if relpos is not None:
        of_query = tl.load(relpos[2] + b * relpos[3] + i, mask=i < Sq, other=0)
        of_key = tl.load(relpos[4] + b * relpos[5] + j, mask=j < Sk, other=0)
        s += tl.load(relpos[0] + h * relpos[1] + (of_query - of_key), mask=inside, other=0.0) * LOG2E
    return s


@triton.jit
def word_inside(words, word: tl.constexpr, keys, BOUND: tl.constexpr):
    """A word of a pattern; with BOUND without the bits of keys from number `keys` on."""
    bits = tl.load(words + word)
    if BOUND:
        inside = tl.minimum(tl.maximum(keys - 32 * word, 0), 32)
        bits = tl.where(inside == 32, bits, bits & ((1 << (inside % 32)) - 1))
    return bits


@triton.jit
def only_kept(s, i, j, elements, b, h, m, n, j0, Sk, Nk, bm, bn, COLS: tl.constexpr, PATTERN: tl.constexpr,
              BOUND: tl.constexpr):  # fmt: skip
    """Scores with -inf for what the pattern of the mask tile (m, n) leaves out and, with BOUND, for keys from Sk on.

    `j0` is the first key of the block, `COLS` how many it has.
    """
    if PATTERN:
        pattern = tl.load(elements[0] + b * elements[2] + h * elements[3] + m.to(tl.int64) * Nk + n)
        row = pattern.to(tl.int64) * bm + (i - m * bm)
        words = elements[1] + row * (bn // 32) + (j0 - n * bn) // 32
        # One load a query and 32 keys; which word a column takes is known when the kernel is compiled.
        local = j - j0
        bits = word_inside(words, 0, Sk - j0, BOUND)
        for word in tl.static_range(1, COLS // 32):
            bits = tl.where(local // 32 == word, word_inside(words, word, Sk - j0, BOUND), bits)
        s = tl.where(((bits >> (local % 32)) & 1) != 0, s, -INF)
    elif BOUND:
        s = tl.where(j < Sk, s, -INF)
    return s
