"""Schemas of the fused adaLN ops: the contract between the Python API and every kernel.

Each op is defined in three namespaces with one schema (see `maskaccel.ops._registry`):

* `torch.ops.maskaccel.<op>`: differentiable, picks the kernel by device;
* `torch.ops.maskaccel_raw.<op>`: the native kernel alone, no autograd; what the API calls when nothing needs
  a gradient;
* `torch.ops.maskaccel_triton.<op>`: the Triton kernel alone.

Contract of the raw ops (a kernel may rely on it, and must check it and raise `RuntimeError` otherwise; the API turns
such an error into a `TypeError`/`ValueError` that names the argument, or normalises the argument and calls again):

* `x`, `a`, `r` and their gradients: `(B, N, D)`, one dtype of fp32, bf16, fp16, last dim contiguous, any other strides.
  Outputs are contiguous. `B`, `N` may be 0. `D` is any positive number.
* Modulation (`scale`, `shift`, `gate`, `scale2`, `shift2`): all of one dtype, `x.dtype` or fp32, last dim contiguous,
  any other strides (chunks of a projection are read in place). Shape `(B|1, D)`, or `(B|1, F, D)` where token `n` reads
  row `n // (N // F)` and F divides N (F = 1 per sample, F = N per token). With `rows` (int32, contiguous, `(N,)` or
  `(B, N)`) every modulation tensor is `(R, D)` and token `n` of sample `b` reads row `rows[n]` or `rows[b, n]`; CPU
  kernels check the values, on a GPU they are trusted (a check would wait for the device). Each modulation tensor has
  its own shape and strides.
* Tables (`scale_table`, `shift_table`, `gate_table`): `(D,)`, contiguous, same dtype as the modulation; added to the
  modulation value before use (adaLN-single). A table without its modulation tensor stands alone.
* `weight`, `bias`, `post_weight`: `(D,)`, contiguous, one dtype, `x.dtype` or fp32.
* Arithmetic is fp32. Statistics are two-pass over the row. `law` says where values are rounded to `x.dtype`:
  fp32: only where a tensor is stored. narrow: after norm, after an RMS weight product, after table + value, after
  `offset + scale`, after the scale product, after the shift sum, after gate act, gate product and residual sum
  (a rounding is skipped where one operand is fp32 and `x` is not, as type promotion would).
  Both laws normalise the residual as stored (rounded).

Math: `p = post_norm(a)` (or `a`), `r = x + act(gate + gate_table) * p` (`act` of no gate at all is 1),
`n = norm(r) * (weight + weight_offset) + bias`, `y = n * (offset + scale + scale_table) + shift + shift_table`
(no scale and no table: `y = n + shift`).

Backward ops recompute the statistics from the stored row and return gradients in schema order; a gradient whose bit is
not set in `needs` (and `None` modulation) is a 0-element tensor. Gradients of modulation are fp32 of shape
`(B|1, F, D)` (F as in the forward tensor, 1 for a 2-D one; the batch-broadcast form is summed over the batch), or per
token `(B, N, D)` when `rows` is given (the caller reduces it); gradients of tables are formed by the caller from them
(a table that stands alone counts as modulation of shape `(1, 1, D)` for this purpose). Gradients of `weight`, `bias`,
`post_weight` and RoPE-side weights are fp32. Reductions are deterministic: no atomics.
"""

from __future__ import annotations

# flags of the adaLN ops
NORMS = {"layer": 0, "rms": 1, "none": 2}  # bits 0-1
LAWS = {"fp32": 0, "narrow": 4}  # bit 2
WEIGHT_PLUS_ONE = 8  # bit 3: weight_offset = 1
GATE_ACTS = {"none": 0, "tanh": 16, "clamp_tanh": 32, "sigmoid_1m": 48}  # bits 4-5; clamp to +-2; sigmoid(1 - g)
POST_NORMS = {None: 0, "none": 0, "rms": 64, "layer": 128}  # bits 6-7
CLIP = 256  # bit 8: clamp the residual to +-65504 before it is stored (fp16 blocks)
NO_RESIDUAL = 512  # bit 9: r is not returned (0 elements)

# flags of qk_norm_rope: bits 0-3 as above, then
ACROSS_HEADS = 16  # one statistic per token over H * Dh; weights are (H * Dh,)
ROPE_HALF = 32  # pairs (i, i + Dh/2); otherwise (2i, 2i + 1)

ACTIVATIONS = {"swiglu": 0, "geglu": 1, "gelu_tanh": 2}  # bits 0-1 of `flags`
GATE_FIRST = 4  # the first half of the last dim is the gate: act(first) * second; otherwise first * act(second)

# bits of `needs` in the backward ops
NEED_X, NEED_A, NEED_GATE, NEED_SCALE, NEED_SHIFT, NEED_SCALE2, NEED_SHIFT2, NEED_WEIGHT, NEED_BIAS, NEED_POST = (
    1 << i for i in range(10)
)

_MOD = "Tensor? scale, Tensor? shift"
_MOD2 = "Tensor? scale2, Tensor? shift2"
_NORM = "Tensor? weight, Tensor? bias, Tensor? scale_table, Tensor? shift_table, Tensor? rows"
_GATE = "Tensor? gate, Tensor? gate_table, Tensor? post_weight"

SCHEMAS = {
    "norm_modulate": f"(Tensor x, {_MOD}, {_NORM}, float eps, float offset, int flags) -> Tensor",
    "norm_modulate_pair": f"(Tensor x, {_MOD}, {_MOD2}, {_NORM}, float eps, float offset, int flags)"
    " -> (Tensor, Tensor)",
    # -> (dx, dscale, dshift, dscale2, dshift2, dweight, dbias)
    "norm_modulate_backward": f"(Tensor dy, Tensor? dy2, Tensor x, {_MOD}, {_MOD2}, {_NORM}, float eps, float offset,"
    " int flags, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "gate_residual_norm_modulate": f"(Tensor x, Tensor a, {_GATE}, {_MOD}, {_NORM}, float eps, float post_eps,"
    " float offset, int flags) -> (Tensor, Tensor)",  # (r, y)
    "gate_residual_norm_modulate_pair": f"(Tensor x, Tensor a, {_GATE}, {_MOD}, {_MOD2}, {_NORM}, float eps,"
    " float post_eps, float offset, int flags) -> (Tensor, Tensor, Tensor)",  # (r, y, y2)
    # dr may be None; dx is the whole gradient of r. Takes the stored r, not x.
    # -> (dx, da, dgate, dscale, dshift, dscale2, dshift2, dweight, dbias, dpost_weight)
    "gate_residual_norm_modulate_backward": f"(Tensor? dr, Tensor dy, Tensor? dy2, Tensor r, Tensor a, {_GATE}, {_MOD},"
    f" {_MOD2}, {_NORM}, float eps, float post_eps, float offset, int flags, int needs) -> (Tensor, Tensor, Tensor,"
    " Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "gate_residual": f"(Tensor x, Tensor a, {_GATE}, Tensor? rows, float post_eps, int flags) -> Tensor",
    # -> (da, dgate, dpost_weight)
    "gate_residual_backward": f"(Tensor dr, Tensor a, {_GATE}, Tensor? rows, float post_eps, int flags, int needs)"
    " -> (Tensor, Tensor, Tensor)",
    # q (B, S, H, Dh), k (B, Sk, Hk, Dh) of one dtype, last dim contiguous; Sk may differ from S only without RoPE.
    # Weights and biases (Dh,), or (H * Dh,) with ACROSS_HEADS, all of one dtype: q.dtype or fp32, contiguous.
    # cos, sin: same dtype (fp32 or q.dtype) and shape, any strides (also in the last dim: complex tables are viewed as
    # real), (S', T), (B|1, S', T) or (B|1, S', H|1, T); T = Dh/2 (one value a pair) or Dh (one value an element:
    # out_i = x_i cos_i -+ x_j sin_i). S' = S, or any with `positions` (int32, contiguous, (S,) or (B, S)): token s
    # reads row positions[s]. Per-head tables need Hk = H. Norm, then RoPE; law narrow rounds in between (and after
    # RMS).
    "qk_norm_rope": "(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias,"
    " Tensor? cos, Tensor? sin, Tensor? positions, float eps, int flags) -> (Tensor, Tensor)",
    # needs: bit 0 dq, 1 dk, 2 q weight, 3 k weight, 4 q bias, 5 k bias. cos and sin get no gradient.
    "qk_norm_rope_backward": "(Tensor dq, Tensor dk, Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight,"
    " Tensor? q_bias, Tensor? k_bias, Tensor? cos, Tensor? sin, Tensor? positions, float eps, int flags, int needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # x (..., 2M) -> (..., M); gelu_tanh: x (..., M) -> (..., M). At most 8 dims; last dim contiguous, the leading dims
    # of one common stride (a view of x as rows exists). The same of dy.
    "gated_activation": "(Tensor x, int flags) -> Tensor",
    "gated_activation_backward": "(Tensor dy, Tensor x, int flags) -> Tensor",
}

# The common calls, in `maskaccel_raw` alone: without tables, norm weights, QK biases, rows and positions, and with the
# numbers in one. A number costs the dispatcher 0.2 us, an absent tensor 0.15 us: a third of a call on a small tensor.
BARE = {
    "norm_modulate_bare": f"(Tensor x, {_MOD}, int packed) -> Tensor",
    "norm_modulate_pair_bare": f"(Tensor x, {_MOD}, {_MOD2}, int packed) -> (Tensor, Tensor)",
    "gate_residual_norm_modulate_bare": f"(Tensor x, Tensor a, Tensor? gate, {_MOD}, int packed) -> (Tensor, Tensor)",
    "gate_residual_norm_modulate_pair_bare": f"(Tensor x, Tensor a, Tensor? gate, {_MOD}, {_MOD2}, int packed)"
    " -> (Tensor, Tensor, Tensor)",
    "gate_residual_bare": "(Tensor x, Tensor a, Tensor? gate, int packed) -> Tensor",
    "qk_norm_rope_bare": "(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin,"
    " int packed) -> (Tensor, Tensor)",
}
OFFSET_ONE = 1 << 16  # in `packed`, beside the flags: offset is 1, otherwise 0; eps is its fp32 bits from bit 32 on
