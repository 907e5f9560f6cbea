"""Schemas of the attention ops and the contract of the kernels behind them.

Layouts: `q (B, Sq, H, D)`, `k, v (B, Sk, Hk, D)` of one dtype (fp32, bf16, fp16), any strides with a contiguous last
dim; `H % Hk == 0`, query head `h` reads key head `h // (H / Hk)`. `D` is a multiple of 8 from 16 to 256. `lse` is fp32
`(B, H, Sq)`, natural logarithm, contiguous. Offsets are 64-bit.

**Which tiles.** The score matrix is cut into mask tiles of `(bm, bn)`: `Mq = ceil(Sq / bm)` rows of
`Nk = ceil(Sk / bn)`; `bm` is a multiple of 16 and `bn` of 32. A mask comes as lists, made by `tile_lists`:

* `count` int32 `(Bm, Hm, Mq, 2)`: how many partial tiles and how many full ones a row of tiles has;
* `index` int32 `(Bm, Hm, Mq, L)`: ids of the key tiles, first the partial ones ascending, then the full ones
  ascending. Entries past the counts are not read;
* `order` int32 `(Bm * Hm * Mq,)`: all rows of tiles by flat id. Rows whose numbers of tiles have equally many binary
  digits go together, most digits first; among these, samples and heads go one after the other, and in each the rows
  with most tiles first (ties: ascending). Long rows begin early and short ones come last, which balances the load, and
  rows that run at the same time read the keys of few heads, which stay in a GPU's L2 (docs/attention-speed.md).

`Bm` is 1 or B, `Hm` is 1 or H (of the queries). `index_t (Bm, Hm, Nk, L')`, `count_t`, `order_t` are the same of the
transposed mask (for each key tile its query tiles); only the backward and the column sums read them. Without a mask all
of them are None and every tile is full: the same loop over all tiles, so an all-true mask gives the same bits where
kernels cut the tiles alike (`bm`, `bn` multiples of 128).

**Which elements of a partial tile.** `pattern_of` int32 `(1|B, 1|H, Mq, Nk)` gives the pattern of each tile (-1: the
tile is full), `patterns` int32 `(P, bm, bn / 32)` the patterns: bit `j % 32` of word `j / 32` of row `i` is set where
element `(i, j)` of the tile is kept. Elements outside the matrix are never kept, whatever the bits say; a tile whose
elements inside the matrix are all kept counts as full. Both are None where a mask has no partial tiles.

**Scores.** `s = scale * q . k + bias + relpos_table[h, relpos_q[i] - relpos_k[j]]`. `bias` is 4-D, each dim full or 1,
fp32 or `q.dtype`, any strides. `relpos_table` fp32 `(1|H, R)`, `relpos_q` int32 `(1|B, Sq)`, `relpos_k` int32
`(1|B, Sk)`, all contiguous; every difference lies in `[0, R)`.

**Result.** `out = out_scale * softmax(s) v + out_add`, formed in fp32 and rounded once, contiguous `(B, Sq, H, D)`.
`out_scale` is fp32 3-D `(1|B, 1|H, 1|Sq)`, any strides; `out_add` has the shape of `out`, is fp32 or `q.dtype`, last
dim contiguous. A row that keeps nothing has softmax(s) v = 0, lse = -inf and zero gradients. `lse` does not know the
epilogue.

**Keep bits** (LiteAttention's test), with flag KEEP, int32 `(B, H, Mq, ceil(Nk / 32))`, bit `n % 32` of word `n / 32`
for tile n. A visited tile is kept if for any row `i` of it inside the matrix

    (m_tile[i] - ref[i]) * log2(e) > skip_threshold

where `m_tile[i]` is the largest kept score of the row within this tile (-inf if none: such a row does not keep) and
`ref[i]` is `reference_lse[b, h, i]`, or without it the largest score of the row in the tiles visited before, in list
order (-inf before the first). Comparison with a `ref` of -inf keeps. The test is for whole mask tiles, however a kernel
cuts them. Tiles not visited have bit 0. Without KEEP, `keep` has 0 elements. With flag PRUNE a tile that is not kept
contributes nothing to this result either (its scores were formed, exponentials and values are left out, and it does not
raise the running maximum).

**Backward.** Scores are formed again; `P = exp(s - lse)`, `dS = P * (dP - delta)` with
`delta = sum_d(dout * out) - dlse`. `needs` asks for dq, dk, dv and `ds` (bits 0 to 3), what is not asked for has 0
elements. `ds` is fp32 `(B, H, Sq, Sk)`, the gradient of the scores, 0 where not kept; the caller reduces it to that of
bias or table. dk and dv are summed over the query heads of a key head. Bit 4, SAME_BITS, asks that the same input gives
the same bits, which all kernels do but that of sm_90a, whose dq is a sum in no fixed order: torch's deterministic mode.
`out` is softmax(s) v, before any epilogue.

`attention_column_sums`: fp32 `(B, H, Sk)`, for each key the sum over queries of `P`.
`merge_attention`: of two partial results over disjoint keys, `lse = log(exp(lse1) + exp(lse2))` and
`out = out1 * exp(lse1 - lse) + out2 * exp(lse2 - lse)`; both -inf: out 0, lse -inf (whatever out1 and out2 hold there).
`out1, out2 (B, S, H, D)` of one dtype, last dim contiguous; lse contiguous.
`tile_lists`: of `bits` int32 `(Bm, Hm, M, W)`, the mask's rows (transpose: of its columns, `tiles` of them), where
`tiles` is Nk and bits from `tiles` on are ignored. `pattern_of` has bits' M and leading dims 1 or those of bits.
`tile_means`: of blocks of `block` tokens of `x (B, S, H, D)` (the last one may be shorter) the means
`(B, ceil(S / block), H, D)` in x's dtype, formed in fp32, and with `alike` fp32 `(B, H, ceil(S / block))`, the mean
cosine of all pairs of a block's tokens (else 0 elements).
`select_tiles`: int32 words of the tiles that are kept, `(B, H, M, ceil(N / 32))`, of `scores (B, H, M, N)`. Tiles of a
row are ranked by score, ties by place. `rule` says which are kept: 0 the first `value`; 1 those before which the
scores, negative ones as 0, sum to at most `value` of the row's sum; 2 those with a score of `value` or more. `limits`
fp32 `(1|B, 1|H)` is `value` of each sample and head. The first `min_per_row` are kept by every rule, and tiles of
`force` in any case; tiles of `forbid` never. Both are bool, broadcastable to the scores.
`linear_attention`: `out = phi(q) kv / z`, `kv = sum_j phi(k_j) v_j`, `z = phi(q) . sum_j phi(k_j) + eps` (normalize 0,
"sum"); with normalize 1, "mean", both sums are means over the Sk keys. phi: 0 relu, 1 elu + 1. GQA as above. kv and z
fp32.
"""

from __future__ import annotations

import functools
import math
import struct

KEEP, PRUNE = 1, 2  # bits of `flags`
TOP, MASS, ABOVE = 0, 1, 2  # values of `rule`
NEED_Q, NEED_K, NEED_V, NEED_S, SAME_BITS = 1, 2, 4, 8, 16  # bits of `needs`
FEATURE_MAPS = {"relu": 0, "elu1": 1}
NORMALIZE = {"sum": 0, "mean": 1}

_LISTS = "Tensor? index, Tensor? count, Tensor? order"
_LISTS_T = "Tensor? index_t, Tensor? count_t, Tensor? order_t"
_ELEMENTS = "Tensor? pattern_of, Tensor? patterns"
_SCORES = "Tensor? bias, Tensor? relpos_table, Tensor? relpos_q, Tensor? relpos_k"

SCHEMAS = {
    # -> (out, lse, keep)
    "tile_attention": f"(Tensor q, Tensor k, Tensor v, {_LISTS}, {_LISTS_T}, {_ELEMENTS}, {_SCORES},"
    " Tensor? reference_lse, Tensor? out_scale, Tensor? out_add, int bm, int bn, float scale, float skip_threshold,"
    " int flags) -> (Tensor, Tensor, Tensor)",
    # -> (dq, dk, dv, ds)
    "tile_attention_backward": f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" {_LISTS}, {_LISTS_T}, {_ELEMENTS}, {_SCORES}, int bm, int bn, float scale, int needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "attention_column_sums": f"(Tensor q, Tensor k, Tensor lse, {_LISTS_T}, {_ELEMENTS}, {_SCORES}, int bm, int bn,"
    " float scale) -> Tensor",
    "merge_attention": "(Tensor out1, Tensor lse1, Tensor out2, Tensor lse2) -> (Tensor, Tensor)",
    # -> (dout1, dlse1, dout2, dlse2)
    "merge_attention_backward": "(Tensor dout, Tensor? dlse, Tensor out1, Tensor lse1, Tensor out2, Tensor lse2)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    # -> (index, count, order); L is `tiles` (transpose: M)
    "tile_lists": "(Tensor bits, Tensor? pattern_of, int tiles, bool transpose) -> (Tensor, Tensor, Tensor)",
    # -> (means, alike)
    "tile_means": "(Tensor x, int block, bool alike) -> (Tensor, Tensor)",
    "select_tiles": "(Tensor scores, Tensor? force, Tensor? forbid, Tensor? limits, int rule, float value,"
    " int min_per_row) -> Tensor",
    "linear_attention": "(Tensor q, Tensor k, Tensor v, int feature_map, int normalize, float eps) -> Tensor",
    # -> (dq, dk, dv)
    "linear_attention_backward": "(Tensor dout, Tensor q, Tensor k, Tensor v, int feature_map, int normalize,"
    " float eps) -> (Tensor, Tensor, Tensor)",
}

# The everyday calls, in `maskaccel_raw` alone: without scores of its own and epilogue, and with the numbers in one
# (`packed`). An absent tensor costs the dispatcher 0.15 us, a number 0.2 us, a result that nobody reads as much.
BARE = {
    # -> (out, lse)
    "tile_attention_bare": f"(Tensor q, Tensor k, Tensor v, {_LISTS}, {_ELEMENTS}, int packed) -> (Tensor, Tensor)",
    # -> (out, lse, keep); `test`: flags, and the fp32 bits of skip_threshold from bit 32 on
    "tile_attention_tested_bare": f"(Tensor q, Tensor k, Tensor v, {_LISTS}, {_ELEMENTS}, Tensor? reference_lse,"
    " int packed, int test) -> (Tensor, Tensor, Tensor)",
}


@functools.lru_cache(maxsize=1024)
def packed(bm: int, bn: int, scale: float) -> int | None:
    """Tiles of bm / 16, bn / 32 and the fp32 bits of scale, from bits 0, 16 and 32 on; None where they do not fit."""
    if bm >= 16 << 16 or bn >= 32 << 16 or not math.isfinite(scale):
        return None
    bits = _upper(scale)
    return None if bits is None else bits | (bn // 32) << 16 | bm // 16


@functools.lru_cache(maxsize=1024)
def packed_test(flags: int, threshold: float) -> int | None:
    """The second number of `tile_attention_tested_bare`; None where it does not fit."""
    bits = _upper(threshold)
    return None if bits is None else bits | flags


def _upper(value: float) -> int | None:
    """The fp32 bits of a number, from bit 32 of an int64 on."""
    try:
        (bits,) = struct.unpack("<i", struct.pack("<f", value))
    except OverflowError:
        return None
    return bits << 32  # type: ignore[no-any-return]


def unpacked(numbers: int) -> dict[str, float]:
    """The numbers of the whole op from those of the bare one."""
    (scale,) = struct.unpack("<f", struct.pack("<i", numbers >> 32))
    return {"bm": (numbers & 0xFFFF) * 16, "bn": (numbers >> 16 & 0xFFFF) * 32, "scale": scale,
            "skip_threshold": 0.0, "flags": 0}  # fmt: skip
