"""Schemas of the token ops and the contract of the kernels behind them; namespaces as in `maskaccel.ops.adaln.schema`.

Common: `x`, `full`, `rows` are `(B, N or K, D)` of one dtype (fp32, bf16, fp16), any strides with a contiguous last
dim (a stride of 0 along the batch is normal); results are contiguous. Index tensors are int32 and contiguous, their
batch is B or 1 (one for all samples). `ids (B|1, K)` holds kept tokens ascending, N in slots that hold none; `inverse
(B|1, N)` the slot of each token or -1. A gather treats every id outside [0, N) as "no row" and gives zeros. Sums are
in fp32, deterministic, no atomics, no synchronisation; offsets are 64-bit. B, N, K may be 0 unless said otherwise.

**Random numbers.** Philox 4x32-10 (Salmon et al. 2011) with key `(seed & 0xffffffff, seed >> 32 & 0xffffffff)` and
counter `(item, sample, step, route | purpose << 24)`, each modulo 2^32; `sample = offset + b` is the number of a
sample among all ranks and accumulation steps, `step` is read from an int64 tensor of one element, so that a captured
graph can count. `word` is the first of the four results. Purposes: 0 kept tokens, 1 noise of `sample_logits`, 2 noise
of `unmask_select`. Where a real number is wanted: `u = ((word >> 9) + 0.5) * 2^-23` in fp32 (exact, never 0 or 1),
Gumbel noise `-log(-log(u))`.

`random_keep(step, order, labels, quota, force, seed, route, offset, batch, n, keep, groups, rows_kept, mode)`: `step`
int64 `(1,)`, on the device of the result; 0 <= route < 2^24; 1 <= keep <= n < 2^24. The key of token t in sample b is
`(1 - forced) << 56 | word << 24 | t` with item t; `force` uint8 `(B|1, n)` or None (none forced).
* mode 0: the tokens in `order` (int32 `(n,)`, a permutation; None: 0 to n - 1) are cut into `groups` runs of equal
  length; of each run the `keep / groups` tokens of smallest keys are kept. Both divisions leave no rest.
* mode 1: n = groups * columns; row r has key `word << 24 | r` of item n + r, column c that of item n + groups + c;
  the `rows_kept` rows and `keep / rows_kept` columns of smallest keys are kept, and of the tokens those in both.
  `order` and `force` are None.
* mode 2: `labels` int32 `(B|1, n)`, `quota` int32 `(B|1, C)`: of class c the `min(quota[c], its tokens)` tokens of
  smallest keys are kept; labels outside [0, C) keep none. Of more than `keep` tokens those of highest t are dropped.
  Results: `keep (batch, keep)`, `inverse (batch, n)`, and in mode 2 `counts (batch,)`, otherwise 0 elements. All
  integers: every backend gives the same bits.

`select_active(score, age, decay, force, keep, high, threshold, flags)`: `score` fp32 `(B, N)` contiguous, `age` int32
`(B, N)`, `decay` fp32 `(A,)` with A >= 1, `force` uint8 `(B|1, N)` or None, 1 <= keep <= N, 0 <= high <= N - keep.
`metric = score * decay[clamp(age, 0, A - 1)] + 0.0`; a NaN counts as -inf. Tokens are ranked by descending metric,
ties ascending. Without flag THRESHOLD: forced tokens are kept (the first `keep` of them where there are more), and of
the others those with ranks among the others in `[high, high + keep - F)`, F the number of forced ones kept. With it
(high is 0): tokens that are forced or have `metric >= threshold`; of more than `keep` the forced, then the best.
Results:
`keep (B, keep)`, `inverse (B, N)`, `counts (B,)` (0 elements without THRESHOLD), `age (B, N)`: 0 for kept tokens, age
+ 1 for the others. fp32 products rounded once, so every backend gives the same bits.

`gather_rows(x, ids, inverse)`: `(B, M, D)`; `ids (B|1, M)` in any order. `inverse` serves the derivative alone, which
is the same op with both exchanged, so ids must be unique then; None refuses a gradient.
`unmerge_rows(x, slot, order, offsets)`: the same gather with `slot (B|1, M)` that may repeat; the other two describe
its derivative, `segment_rows`.
`segment_rows(x, order, offsets, slot, mean)`: `order (B|1, N)`, `offsets (B|1, S + 1)` ascending: row s of the result
`(B, S, D)` is the sum (mean) of the rows `x[order[offsets[s]]], ...` up to `offsets[s + 1]`, in that order; 0 for
none.
`slot (B|1, N)` is the inverse map, for the derivative.

`scatter_merge(full, rows, ids, inverse, gate, mask_token, pos, lam, mode)`: with `s = inverse[n]`, in fp32, rounded
once:
* REPLACE: `rows[s]` for kept tokens, `full[n]` for dropped ones.
* ADD_GATED: `full[n] + gate * rows[s]`, and `full[n]`. `gate` `(B|1, 1, D)` or `(B|1, K, D)`, rows.dtype or fp32, any
  strides with a dense last dim; None is 1.
* MASK_TOKEN: `rows[s] + pos[n]`, and `mask_token + pos[n]`. `mask_token (D,)`, `pos (B|1, N, D)` or None, each
  rows.dtype or fp32.
* BLEND: `lam * full[n] + (1 - lam) * rows[s]`, and `full[n]`.
* ZERO: as MASK_TOKEN with a token of zeros. `full` is None for MASK_TOKEN and ZERO. Operands that a mode does not
  name are None.
`scatter_merge_backward(dout, rows, ids, inverse, gate, lam, mode, needs)`: bits of `needs`: 1 `dfull` `(B, N, D)`
(not of ADD_GATED, whose dfull is dout), 2 `drows (B, K, D)`, 4 `dgate` fp32 of the shape of gate with the whole batch
B, 8 `dmask` fp32 `(D,)`. What is not asked for has 0 elements. `rows` is read for dgate alone and may be None without
it.

`gather_modulate(x, ids, inverse, scale, shift, weight, bias, eps, offset, flags)`: rows `x[ids]` and `norm_modulate`
of them (`maskaccel.ops.adaln.schema`: same flags, laws and dtypes). `scale`, `shift` `(B|1, D)`, `(B|1, 1, D)` or
`(B|1, N, D)`, read at the token's own row. Slots without a token give rows of 0 and y of 0. With flag NO_ROWS the
rows have 0 elements.

`write_kv_rows(q, k, v, k_cache, v_cache, k_scale, v_scale, ids, q_weight, k_weight, cos, sin, positions, eps,
flags)`:
`k, v (B, M, Hk, Dh)`, `q (B, M, H, Dh)` or None, dtype as x, last dim contiguous, any other strides; caches
`(B, S, Hk, Dh)`, last dim contiguous, any other strides, not expanded, of k's dtype, or uint8: the bits of fp8 e4m3fn
with fp32 scales `(B, S, Hk)` contiguous. Norm and RoPE of q and k are those of `qk_norm_rope` (same flags, weights
and tables; `cos, sin` `(S', T)` or `(B|1, S', T)`, or None); row m reads row `positions[m]` of the tables, int32
`(M,)` or `(B, M)`, None: `ids[m]`; clamped to the table. Then row
`ids[b, m]` (int32 `(B|1, M)`; outside [0, S): written nowhere) of the
caches takes k and v; of equal ids the last counts. With flag PRE_ROPE the cache takes k before RoPE. fp8: the scale
of a row and head is its largest magnitude / 448 (1 for zeros), values are `x / scale` rounded to the nearest even.
Returns q (0 elements for None). Nothing else may share memory with the caches. M and S of 1 or more for fp8.
`read_kv_rows(cache, scale, kind)`: uint8 cache and scales as above; `value * scale` as fp32, bf16 or fp16 (kind 0, 1,
2).

`match_tokens(metric, src, dst)`: `metric (B, N, C)` as x, `src (B|1, Ns)`, `dst (B|1, Nd)` ids with Nd >= 1: for each
src row the position in `dst` of the row of largest cosine similarity, int32 `(B, Ns)` (ties: the lowest), and the
similarity, fp32. A row of zeros has similarity 0 to all. Scores never go to memory as a matrix.

`sample_logits(logits, tokens, step, noise, mask_id, seed, offset, temperature, flags)`: `logits (B, N, V)` fp32, bf16
or fp16, last dim contiguous, V >= 1; `tokens` int64 `(B, N)` contiguous. Where `tokens` is not `mask_id` the logits
are not read: the result is that token and confidence +inf. Elsewhere, in one pass over the row: the id of the largest
`logit + temperature * g` (ties: the lowest), where g is Gumbel noise of item `n * V + v`, or `noise` fp32 `(B, N,
V)`; and its confidence under softmax(logits) (with flag SCALED under softmax(logits / temperature)): bits 0-1 of
flags: 0 the probability of the id, 1 the largest probability minus the second (0 for V = 1: then 1), 2 the negative
entropy in nats, 3 the logarithm of the probability. A row with a NaN has id `mask_id` and confidence NaN. Logits of
-inf have probability 0 and are never taken, unless all are: then as with a NaN. +inf counts as a NaN.
Returns int64 `(B, N)` and fp32 `(B,
N)`. `unmask_select(confidence, sampled, tokens, step, count, groups, hold, noise, mask_id, seed, offset, threshold,
temperature)`: candidates are the tokens with `tokens == mask_id`, no `hold` (uint8 `(B|1, N)` or None), a group in
[0, G) (`groups` int32 `(B|1, N)`; None: all in group 0) and a confidence that is no NaN. Their metric is `confidence
+ temperature * g` with Gumbel noise of item n (or `noise` fp32 `(B, N)`); temperature 0 adds nothing. In each group
the `count[b, g]` (int32 `(B|1, G)`) candidates of largest metric (ties: the lowest) take their sampled token, and so
does every candidate whose confidence is `threshold` or more (+inf: none). Returns int64 `(B, N)`.

Differentiable: gather_rows, unmerge_rows, segment_rows, scatter_merge, gather_modulate. The others have no
derivative.
"""

from __future__ import annotations

KEEP_GROUPS, KEEP_ROWS_COLS, KEEP_CLASSES = 0, 1, 2
THRESHOLD = 1
MERGES = {"replace": 0, "add_gated": 1, "mask_token": 2, "blend": 3, "zero": 4}
NEED_FULL, NEED_ROWS, NEED_GATE, NEED_MASK = 1, 2, 4, 8
NO_ROWS = 1 << 10  # flag of gather_modulate, beside those of the adaLN ops
PRE_ROPE = 64  # flag of write_kv_rows, beside those of qk_norm_rope
CONFIDENCES = {"confidence": 0, "margin": 1, "entropy": 2, "log": 3}  # bits 0-1 of flags
SCALED = 4
PURPOSE_KEEP, PURPOSE_SAMPLE, PURPOSE_SELECT = 0, 1, 2
FP8_MAX = 448.0

_INDEX = "Tensor ids, Tensor inverse"

SCHEMAS = {
    # -> (keep, inverse, counts)
    "random_keep": "(Tensor step, Tensor? order, Tensor? labels, Tensor? quota, Tensor? force, int seed, int route,"
    " int offset, int batch, int n, int keep, int groups, int rows_kept, int mode) -> (Tensor, Tensor, Tensor)",
    # -> (keep, inverse, counts, age)
    "select_active": "(Tensor score, Tensor age, Tensor decay, Tensor? force, int keep, int high, float threshold,"
    " int flags) -> (Tensor, Tensor, Tensor, Tensor)",
    "gather_rows": "(Tensor x, Tensor ids, Tensor? inverse) -> Tensor",
    "unmerge_rows": "(Tensor x, Tensor slot, Tensor order, Tensor offsets) -> Tensor",
    "segment_rows": "(Tensor x, Tensor order, Tensor offsets, Tensor slot, bool mean) -> Tensor",
    "scatter_merge": f"(Tensor? full, Tensor rows, {_INDEX}, Tensor? gate, Tensor? mask_token, Tensor? pos, float lam,"
    " int mode) -> Tensor",
    # -> (dfull, drows, dgate, dmask)
    "scatter_merge_backward": f"(Tensor dout, Tensor? rows, {_INDEX}, Tensor? gate, float lam, int mode, int needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    # -> (rows, y)
    "gather_modulate": f"(Tensor x, {_INDEX}, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, float eps,"
    " float offset, int flags) -> (Tensor, Tensor)",
    "write_kv_rows": "(Tensor? q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale,"
    " Tensor(d!)? v_scale, Tensor ids, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin,"
    " Tensor? positions, float eps, int flags) -> Tensor",
    "read_kv_rows": "(Tensor cache, Tensor scale, int kind) -> Tensor",
    # -> (best, similarity)
    "match_tokens": "(Tensor metric, Tensor src, Tensor dst) -> (Tensor, Tensor)",
    # -> (ids, confidence)
    "sample_logits": "(Tensor logits, Tensor tokens, Tensor step, Tensor? noise, int mask_id, int seed, int offset,"
    " float temperature, int flags) -> (Tensor, Tensor)",
    "unmask_select": "(Tensor confidence, Tensor sampled, Tensor tokens, Tensor step, Tensor count, Tensor? groups,"
    " Tensor? hold, Tensor? noise, int mask_id, int seed, int offset, float threshold, float temperature) -> Tensor",
}

# The common calls, in `maskaccel_raw` alone, with their numbers in one: as `maskaccel.ops.adaln.schema.BARE`. Of the
# ids of `write_kv_rows_bare` no two in the cache are equal, so that nothing has to find the last of equal ones.
BARE = {
    # -> (keep, inverse); two integers in one, the second of each from bit 32 on
    "random_keep_bare": "(Tensor step, int seed, int offset, int batch_route, int n_keep) -> (Tensor, Tensor)",
    "gather_modulate_bare": f"(Tensor x, {_INDEX}, Tensor? scale, Tensor? shift, int packed) -> (Tensor, Tensor)",
    "write_kv_rows_bare": "(Tensor? q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor ids,"
    " Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, int packed) -> Tensor",
}
