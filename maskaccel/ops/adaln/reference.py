"""Plain-torch forms of the fused adaLN ops: the oracle of every test and the fallback of every device.

They accept fp64 (the ground truth of the error rule), are differentiable by ordinary autograd, and round where the
`law` says (`maskaccel.ops.adaln.schema`). `docs/numerics.md` explains the two laws.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FP16_MAX = 65504.0


def spread(m: Tensor, x: Tensor, rows: Tensor | None) -> Tensor:
    """A modulation tensor of any allowed shape, as one that broadcasts against `x` of shape (B, N, D)."""
    if rows is not None:
        return m[rows.long()] if rows.dim() == 2 else m[rows.long()][None]
    if m.dim() == 2:
        return m[:, None]
    groups, n = m.shape[1], x.shape[1]
    return m if groups in (1, n) else m.repeat_interleave(n // groups, dim=1)


def _wide(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _modulation(m: Tensor | None, table: Tensor | None, x: Tensor, rows: Tensor | None, narrow: bool) -> Tensor | None:
    """Value plus table, in the working dtype of the law."""
    if m is not None:
        m = spread(m, x, rows)
    parts = [t for t in (m, table) if t is not None]
    if not parts:
        return None
    if not narrow:
        parts = [t.to(_wide(x)) for t in parts]
    return parts[0] + parts[1] if len(parts) == 2 else parts[0]


def normalize(x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, weight_offset: float, eps: float,
              narrow: bool) -> Tensor:  # fmt: skip
    """LayerNorm or RMSNorm over the last dim; fp32 result under the fp32 law, `x.dtype` under the narrow one."""
    wide = x.to(_wide(x))
    affine_inside = not narrow or kind == "layer"
    if kind == "layer":
        out = F.layer_norm(wide, wide.shape[-1:], eps=eps)
    elif kind == "rms":
        out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    else:
        out = wide
    if affine_inside:
        if weight is not None:
            out = out * (weight.to(wide.dtype) + weight_offset)
        if bias is not None:
            out = out + bias.to(wide.dtype)
        return out.to(x.dtype) if narrow else out
    out = out.to(x.dtype)
    if weight is not None:
        out = (out * (weight + weight_offset if weight_offset else weight)).to(x.dtype)
    return out if bias is None else (out + bias).to(x.dtype)


def _modulate(
    n: Tensor, x: Tensor, scale, shift, scale_table, shift_table, rows, offset: float, narrow: bool
) -> Tensor:
    s = _modulation(scale, scale_table, x, rows, narrow)
    b = _modulation(shift, shift_table, x, rows, narrow)
    y = n if s is None else n * (offset + s)
    y = y if b is None else y + b
    return y.to(x.dtype)


def _gate(gate: Tensor | None, table: Tensor | None, x: Tensor, rows, act: str, narrow: bool) -> Tensor | None:
    g = _modulation(gate, table, x, rows, narrow)
    if g is None or act == "none":
        return g
    if act == "tanh":
        return g.tanh()
    if act == "clamp_tanh":
        return g.clamp(-2.0, 2.0).tanh()
    return torch.sigmoid(1.0 - g)


def norm_modulate(x, scale=None, shift=None, *, norm="layer", weight=None, bias=None, eps=1e-6, offset=1.0, rows=None,
                  law="fp32", weight_offset=0.0, scale_table=None, shift_table=None, scale2=None,
                  shift2=None):  # fmt: skip
    """`norm(x) * (offset + scale) + shift`; a second result when `scale2` or `shift2` is given."""
    narrow = law == "narrow"
    n = normalize(x, norm, weight, bias, weight_offset, eps, narrow)
    y = _modulate(n, x, scale, shift, scale_table, shift_table, rows, offset, narrow)
    if scale2 is None and shift2 is None:
        return y
    return y, _modulate(n, x, scale2, shift2, None, None, rows, offset, narrow)


def gate_residual(x, a, gate=None, *, gate_act="none", post_norm=None, post_weight=None, clip=False, rows=None,
                  law="fp32", gate_table=None, post_eps=1e-6, weight_offset=0.0):  # fmt: skip
    """`x + act(gate) * post_norm(a)`."""
    narrow = law == "narrow"
    g = _gate(gate, gate_table, x, rows, gate_act, narrow)
    if post_norm not in (None, "none"):
        a = normalize(a, post_norm, post_weight, None, weight_offset, post_eps, narrow)
    if not narrow:
        x_, a = x.to(_wide(x)), a.to(_wide(x))
    else:
        x_ = x
    r = x_ + (a if g is None else g * a)
    if clip:
        r = r.clamp(-FP16_MAX, FP16_MAX)
    return r.to(x.dtype)


def gate_residual_norm_modulate(x, a, gate=None, scale=None, shift=None, *, gate_act="none", post_norm=None,
                                post_weight=None, post_eps=None, norm="layer", weight=None, bias=None, eps=1e-6,
                                offset=1.0, rows=None, law="fp32", weight_offset=0.0, gate_table=None, scale_table=None,
                                shift_table=None, scale2=None, shift2=None, clip=False):  # fmt: skip
    """The residual `r` and its modulated norm `y` (and `y2`)."""
    r = gate_residual(x, a, gate, gate_act=gate_act, post_norm=post_norm, post_weight=post_weight, clip=clip, rows=rows,
                      law=law, gate_table=gate_table, post_eps=eps if post_eps is None else post_eps,
                      weight_offset=weight_offset)  # fmt: skip
    y = norm_modulate(r, scale, shift, norm=norm, weight=weight, bias=bias, eps=eps, offset=offset, rows=rows, law=law,
                      weight_offset=weight_offset, scale_table=scale_table, shift_table=shift_table, scale2=scale2,
                      shift2=shift2)  # fmt: skip
    return (r, *y) if isinstance(y, tuple) else (r, y)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, half: bool, positions: Tensor | None) -> Tensor:
    """Rotary embedding of `x` (B, S, H, Dh) in fp32 (fp64 for fp64)."""
    wide = x.to(_wide(x))

    def table(t: Tensor) -> Tensor:  # (1|B, S, 1|H, Dh)
        t = t.to(wide.dtype)
        t = t[None] if t.dim() == 2 else t
        t = t[:, :, None] if t.dim() == 3 else t
        if positions is not None:
            at = positions.long()
            if at.dim() == 1:
                t = t[:, at]
            else:
                t = t[0][at] if len(t) == 1 else t[torch.arange(len(t), device=t.device)[:, None], at]
        if t.shape[-1] == x.shape[-1] // 2:
            t = torch.cat([t, t], -1) if half else t.repeat_interleave(2, dim=-1)
        return t

    if half:
        x1, x2 = wide.chunk(2, dim=-1)
        turned = torch.cat([-x2, x1], -1)
    else:
        turned = torch.stack([-wide[..., 1::2], wide[..., 0::2]], -1).flatten(-2)
    return wide * table(cos) + turned * table(sin)


def qk_norm_rope(q, k, q_weight=None, k_weight=None, cos=None, sin=None, *, norm="rms", across_heads=False,
                 rope="interleaved", positions=None, eps=1e-6, law="fp32", weight_offset=0.0, q_bias=None,
                 k_bias=None):  # fmt: skip
    """QK norm per head (or across heads) and rotary embedding."""
    narrow = law == "narrow"

    def one(t: Tensor, weight, bias) -> Tensor:
        flat = t.flatten(2) if across_heads else t
        n = normalize(flat, norm, weight, bias, weight_offset, eps, narrow).view(t.shape)
        if cos is not None:
            n = rotate(n, cos, sin, rope == "half", positions)
        return n.to(t.dtype)

    return one(q, q_weight, q_bias), one(k, k_weight, k_bias)


def gated_activation(x, kind="swiglu", *, gate_first=False):
    """swiglu, geglu: value times activated gate, the two halves of the last dim; gelu_tanh: elementwise."""
    wide = x.to(_wide(x))
    if kind == "gelu_tanh":
        return F.gelu(wide, approximate="tanh").to(x.dtype)
    value, gate = wide.chunk(2, dim=-1)
    if gate_first:
        value, gate = gate, value
    return (value * (F.silu(gate) if kind == "swiglu" else F.gelu(gate))).to(x.dtype)
