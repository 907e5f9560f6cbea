"""Schemas of the cached-feature ops; the namespaces and rules are those of `maskaccel.ops.adaln.schema`.

`relative_difference(x, reference, base)`: `x`, `reference`, `base` are `(B, ...)` of one shape, two dims or more, and
one dtype (fp32, bf16, fp16), contiguous. With `v = x - base` (or `x`): returns fp32 `(B, 2)`: sum |v - reference| and
sum |reference| of each sample, in one pass, deterministic, without a synchronisation.

`combine_history(history, weights, x, gate)`: `history` `(K, B, N, D)` of fp32, bf16, fp16 (dense in N and D; any stride
of K and B), K <= 16, `weights` fp32 contiguous `(K,)` or `(K, D)` on the same device, `x` `(B, N, D)` or None (dense),
`gate` `(B|1, F, D)` as the modulation of the adaLN ops (x.dtype or fp32) or None:
`out = x + gate * sum_k weights[k] * history[k]`, in fp32, rounded once to the dtype of `x` (of `history` without `x`).
K = 0 is not allowed.

`combine_sites(history, weights, x, gates)`: S forecasts at once: `history` `(S, K, B, N, D)` (dense in N and D; any
stride of S, K and B), S of 1 or more, K <= 16, D of 1 or more, `weights` fp32 contiguous `(K,)`, `(S, K)` or
`(S, K, D)`, `x` as above, `gates` `(S, B|1, F, D)` with F dividing N, or `(S, B|1, D)`, or None (the dtype of the
result, or fp32; last dim contiguous): `out = x + sum_s gates[s] * sum_k weights[s, k] * history[s, k]`, in fp32,
rounded once.

`gram(history, per_sample)`: `history` as above. Returns fp64 `(K, K)`: `<history[i], history[j]>` over all elements, or
`(B, K, K)` of each sample. Products and sums are fp64, deterministic; `out[i, j]` and `out[j, i]` have the same bits.

`scatter_combine(history, weights, fresh, index, labels, x, gate, newest, gamma)`: writes `history[newest]`, then
combines. `history`, `weights`, `x`, `gate` as in `combine_history`, but `history` must not be expanded, and nothing
else may share memory with `history[newest]`. `fresh` `(B, M, D)` of the dtype of history, `index` int32 `(B, M)`,
`labels` int32 `(B, N)` or None, all contiguous. Row `index[b, m]` of sample b takes `fresh[b, m]`; of equal indices
the last m counts. With `labels` and 0 < gamma <= 1 every other row n with fresh rows of its label becomes `gamma *
mean(those rows) + (1 - gamma) * row`, rounded once; without them it stays. Indices are 0 to N - 1: checked on a CPU;
elsewhere a row of another index is left out. Result: `combine_history` of what history then holds.

`kmeans(x, init, k, iters, metric)`: `x` `(B, N, D)` (last dim contiguous) with D of 1 or more, 1 <= k <= min(N, 1024),
`init` fp32 contiguous `(B, k, D)` or None (row `(2 c + 1) N // (2 k)` for cluster c), iters >= 0, metric 0 squared L2,
1 L1, 2 cosine (one minus it). `iters` times: each row to its nearest centroid (of equal ones the lowest), each
centroid to the mean of its rows (cosine: of its rows at unit length; a row of zeros stays zero), an empty cluster's
stays. Then once more each row to its nearest. Returns int32 labels `(B, N)`, fp32 centroids `(B, k, D)` and int32
representatives `(B, k)`: the member of each cluster nearest to its centroid (of equal ones the lowest row); for empty
clusters, one after the other, the nearest row that represents no cluster yet. fp32, deterministic, no synchronisation.

`combine_history_norm_modulate(history, weights, x, gate, scale, shift, ...)`: the first four as `combine_history`, with
D of 1 or more; the others as `norm_modulate` (`maskaccel.ops.adaln.schema`) takes them beside an `x` of the dtype of
the result; scale, shift and their tables share a dtype, which need not be that of the gate. Returns `h`, the result of
`combine_history` under both laws, and `norm_modulate` of `h` as stored.

`norm_modulate_difference(x, reference, scale, shift, ...)`: all but `reference` as `norm_modulate`; `reference` of the
shape and dtype of `x`, last dim contiguous. Returns `y` and fp32 `(B, 2)`: sum |y - reference| and sum |reference| of
each sample, `y` as stored, deterministic, without a synchronisation.

No op here is differentiable: the API refuses inputs that require grad.
"""

METRICS = {"l2": 0, "l1": 1, "cosine": 2}
MAX_CLUSTERS = 1024
_NORM = (
    "Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, Tensor? scale_table, Tensor? shift_table,"
    " Tensor? rows, float eps, float offset, int flags"
)

SCHEMAS = {
    "relative_difference": "(Tensor x, Tensor reference, Tensor? base=None) -> Tensor",
    "combine_history": "(Tensor history, Tensor weights, Tensor? x, Tensor? gate) -> Tensor",
    "combine_sites": "(Tensor history, Tensor weights, Tensor? x, Tensor? gates) -> Tensor",
    "gram": "(Tensor history, bool per_sample) -> Tensor",
    "scatter_combine": (
        "(Tensor(a!) history, Tensor weights, Tensor fresh, Tensor index, Tensor? labels, Tensor? x, Tensor? gate, "
        "int newest, float gamma) -> Tensor"
    ),
    "kmeans": "(Tensor x, Tensor? init, int k, int iters, int metric) -> (Tensor, Tensor, Tensor)",
    "combine_history_norm_modulate": f"(Tensor history, Tensor weights, Tensor? x, Tensor? gate, {_NORM})"
    " -> (Tensor, Tensor)",  # (h, y)
    "norm_modulate_difference": f"(Tensor x, Tensor reference, {_NORM}) -> (Tensor, Tensor)",  # (y, sums)
}
