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

No op here is differentiable: the API refuses inputs that require grad.
"""

SCHEMAS = {
    "relative_difference": "(Tensor x, Tensor reference, Tensor? base=None) -> Tensor",
    "combine_history": "(Tensor history, Tensor weights, Tensor? x, Tensor? gate) -> Tensor",
    "combine_sites": "(Tensor history, Tensor weights, Tensor? x, Tensor? gates) -> Tensor",
    "gram": "(Tensor history, bool per_sample) -> Tensor",
}
