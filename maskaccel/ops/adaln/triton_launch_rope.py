"""Calls of the QK-norm-rotation and activation kernels: the contract checked, strides and launch shapes worked out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _triton as host
from .schema import ACROSS_HEADS, LAWS, ROPE_HALF

_NARROW = LAWS["narrow"]


def check_qk(q: Tensor, k: Tensor, weights: tuple[Tensor | None, ...], flags: int) -> None:
    host.check_activation("q", q, dims=4)
    host.check_activation("k", k, dims=4)
    if k.dtype != q.dtype or k.device != q.device or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise RuntimeError(f"k must be {q.dtype} with the batch and head dim of q {tuple(q.shape)}, got {k.dtype} "
                           f"{tuple(k.shape)}")  # fmt: skip
    if flags & 3 == 3:
        raise RuntimeError(f"flags name no norm: {flags}")
    names = ("q_weight", "k_weight", "q_bias", "k_bias")
    for name, t in zip(names, weights, strict=True):
        of = q if name[0] == "q" else k
        host.check_vector(name, t, of.shape[2] * of.shape[3] if flags & ACROSS_HEADS else of.shape[3], q)
    host.one_dtype("weights and biases", *weights)


class Rope:
    """cos, sin and positions as kernel operands: `(tensor, batch, token, head and last stride)` of each table."""

    def __init__(self, q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None) -> None:
        self.full = self.per_head = False
        self.cos = self.sin = self.positions = None
        self.positions_batch = 0
        if cos is None or sin is None:
            if cos is not None or sin is not None:
                raise RuntimeError("cos and sin must be given together")
            return
        batch, tokens, heads, width = q.shape
        if width % 2 or k.shape[1] != tokens:
            got = f"{tuple(q.shape)}, {tuple(k.shape)}"
            raise RuntimeError(f"RoPE needs an even head dim and k as long as q, got {got}")
        if cos.shape != sin.shape or cos.dtype != sin.dtype or cos.dtype not in (q.dtype, torch.float32):
            raise RuntimeError(f"cos and sin must agree and be {q.dtype} or fp32, got {cos.dtype} {tuple(cos.shape)}, "
                               f"{sin.dtype} {tuple(sin.shape)}")  # fmt: skip
        if cos.device != q.device or sin.device != q.device:
            raise RuntimeError(f"cos and sin must be on {q.device}, got {cos.device}, {sin.device}")
        if cos.dim() not in (2, 3, 4) or cos.shape[-1] not in (width, width // 2):
            raise RuntimeError(f"cos must be (..., S, {width} or {width // 2}), got {tuple(cos.shape)}")
        self.full = cos.shape[-1] == width
        self.per_head = cos.dim() == 4 and cos.shape[2] != 1
        if cos.dim() > 2 and cos.shape[0] not in (1, batch):
            raise RuntimeError(f"cos must have batch 1 or {batch}, got {tuple(cos.shape)}")
        if self.per_head and not (cos.shape[2] == heads == k.shape[2]):
            got = f"{tuple(cos.shape)}, {tuple(k.shape)}"
            raise RuntimeError(f"per-head cos needs {heads} heads in cos and k, got {got}")
        if positions is None:
            if cos.shape[0 if cos.dim() == 2 else 1] != tokens:
                raise RuntimeError(f"cos must have {tokens} token rows, got {tuple(cos.shape)}")
        else:
            if positions.dtype != torch.int32 or not positions.is_contiguous() or positions.device != q.device:
                raise RuntimeError(f"positions must be contiguous int32 on {q.device}, got {positions.dtype}")
            if positions.shape not in ((tokens,), (batch, tokens)):
                got = tuple(positions.shape)
                raise RuntimeError(f"positions must be ({tokens},) or ({batch}, {tokens}), got {got}")
            self.positions, self.positions_batch = positions, tokens if positions.dim() == 2 else 0
        self.cos, self.sin = self._operand(cos), self._operand(sin)

    def _operand(self, t: Tensor) -> tuple[Tensor, int, int, int, int]:
        batch = t.stride(0) if t.dim() > 2 and t.shape[0] > 1 else 0
        return t, batch, t.stride(0 if t.dim() == 2 else 1), t.stride(2) if self.per_head else 0, t.stride(-1)

    @property
    def tables(self) -> tuple:
        """The operands of a kernel: cos, sin, positions and their batch stride."""
        return self.cos, self.sin, self.positions, self.positions_batch


def launch_shape(q: Tensor, k: Tensor, rope: Rope, flags: int, per_thread: int) -> dict:
    """Constants of a launch: tiles that cover the heads and pairs of one token, and their warps."""
    half = bool(flags & ROPE_HALF) and rope.cos is not None
    width = q.shape[3]
    pairs = host.power_of_two(width // 2) if half else max(host.power_of_two(width) // 2, 1)
    heads = [host.power_of_two(t.shape[2]) for t in (q, k)]
    tile = 2 * pairs * max(heads)
    if tile > host.MAX_WIDTH:
        got = f"{tuple(q.shape)}, {tuple(k.shape)}"
        raise RuntimeError(f"heads times head dim must be at most {host.MAX_WIDTH}, got {got}")
    return {
        "Q_HEADS": heads[0], "K_HEADS": heads[1], "PAIRS": pairs, "FULL": rope.full, "PER_HEAD": rope.per_head,
        "FLAGS": flags if half else flags & ~ROPE_HALF, "num_warps": host.block_and_warps(tile, per_thread)[1],
    }  # fmt: skip


def qk_norm_rope(q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, positions, eps, flags):
    check_qk(q, k, (q_weight, k_weight, q_bias, k_bias), flags)
    rope = Rope(q, k, cos, sin, positions)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    q_tokens, k_tokens = (0 if t.numel() == 0 else t.shape[0] * t.shape[1] for t in (q, k))
    if q_tokens or k_tokens:
        from .triton_rope import qk_forward

        host.launch(
            qk_forward, (max(q_tokens, k_tokens), 2), q, q, k, q_out, k_out, q_weight, k_weight, q_bias, k_bias,
            *rope.tables, q.stride()[:3], k.stride()[:3], q_tokens, k_tokens, q.shape[1], k.shape[1], q.shape[2],
            k.shape[2], q.shape[3], eps, **launch_shape(q, k, rope, flags, 16),
            enable_fp_fusion=not flags & _NARROW,
        )  # fmt: skip
    return q_out, k_out


def qk_norm_rope_backward(dq, dk, q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, positions, eps, flags, needs):
    vectors = (q_weight, k_weight, q_bias, k_bias)
    check_qk(q, k, vectors, flags)
    host.check_activation("dq", dq, q, dims=4)
    host.check_activation("dk", dk, k, dims=4)
    rope = Rope(q, k, cos, sin, positions)
    dq_out, dk_out = q.new_empty(q.shape if needs & 1 else 0), k.new_empty(k.shape if needs & 2 else 0)
    widths = [v.numel() if v is not None and needs & (4 << i) else 0 for i, v in enumerate(vectors)]
    q_tokens, k_tokens = (0 if t.numel() == 0 else t.shape[0] * t.shape[1] for t in (q, k))
    if not q_tokens and not k_tokens:
        return dq_out, dk_out, *(q.new_zeros(w, dtype=torch.float32) for w in widths)

    from .triton_rope import qk_backward

    most = max(q_tokens, k_tokens)
    run, programs = host.runs(most, most)
    partials = [q.new_empty(1, programs, w, dtype=torch.float32) if w else None for w in widths]
    host.launch(
        qk_backward, (programs, 2), q, dq, dk, q, k, q_weight, k_weight, *rope.tables, dq_out if needs & 1 else None,
        dk_out if needs & 2 else None, *partials, dq.stride()[:3], dk.stride()[:3], q.stride()[:3], k.stride()[:3], run,
        q_tokens, k_tokens, q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], eps,
        **launch_shape(q, k, rope, flags & ~_NARROW, 8),
    )  # fmt: skip
    none = q.new_empty(0, dtype=torch.float32)
    sums = (none.clone() if p is None else host.reduce_partials(p, 1, 1).flatten() for p in partials)
    return dq_out, dk_out, *sums


def _as_rows(name: str, t: Tensor) -> Tensor:
    """`t` as (rows, width); RuntimeError if that is no view of it."""
    if t.dim() == 0:
        raise RuntimeError(f"{name} must have a last dim")
    rows = t.view(-1, t.shape[-1]) if t.numel() else t.reshape(0, t.shape[-1])
    host.check_activation(name, rows, dims=2)
    return rows


def _activation_width(x: Tensor, flags: int) -> int:
    """Width of the output."""
    if flags & 3 == 3:
        raise RuntimeError(f"flags name no activation: {flags}")
    if flags & 3 == 2:
        return x.shape[-1]
    if x.shape[-1] % 2:
        raise RuntimeError(f"x must have an even last dim (value and gate), got {tuple(x.shape)}")
    return x.shape[-1] // 2


def gated_activation(x, flags):
    from .triton_activation import activation_forward

    rows, width = _as_rows("x", x), _activation_width(x, flags)
    y = x.new_empty(*x.shape[:-1], width)
    if y.numel():
        block, warps = host.block_and_warps(min(width, 1024), 8)
        grid = (rows.shape[0], math.ceil(width / block))
        host.launch(activation_forward, grid, x, rows, y, rows.stride(0), width, FLAGS=flags, BLOCK=block,
                    num_warps=warps)  # fmt: skip
    return y


def gated_activation_backward(dy, x, flags):
    from .triton_activation import activation_backward

    rows, width = _as_rows("x", x), _activation_width(x, flags)
    if dy.shape != (*x.shape[:-1], width) or dy.dtype != x.dtype or dy.device != x.device:
        raise RuntimeError(f"dy must be {x.dtype} like the result of {tuple(x.shape)}, got {dy.dtype} "
                           f"{tuple(dy.shape)}")  # fmt: skip
    dy_rows, dx = _as_rows("dy", dy), x.new_empty(x.shape)
    if dx.numel():
        block, warps = host.block_and_warps(min(width, 1024), 8)
        grid = (rows.shape[0], math.ceil(width / block))
        host.launch(activation_backward, grid, x, dy_rows, rows, dx, dy_rows.stride(0), rows.stride(0), width,
                    FLAGS=flags, BLOCK=block, num_warps=warps)  # fmt: skip
    return dx
