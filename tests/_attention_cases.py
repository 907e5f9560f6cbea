"""Random calls of `tile_attention`, the truth in fp64 and plain torch beside it. Needs torch alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from maskaccel import ops
from maskaccel.masks import GridWindow, TileMask, TokenOrder

HEAD_DIMS = (16, 24, 32, 40, 48, 64, 72, 80, 88, 96, 128, 160, 256)
LENGTHS = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 96, 127, 128, 129, 150)
BLOCKS = ((16, 32), (32, 32), (64, 64), (48, 96), (128, 64), (128, 128))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Case:
    """One call.

    Attributes:
        q: Queries; with `k` and `v`, in any layout.
        mask: The mask, or None.
        kept: The same, bool `(B, H, Sq, Sk)`.
        kwargs: Options of the call.
        dout: Gradient of the result.
        dlse: Gradient of lse, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: TileMask | None
    kept: Tensor
    dout: Tensor
    dlse: Tensor | None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        shapes = f"q {tuple(self.q.shape)} {self.q.stride()}, k {tuple(self.k.shape)} {self.k.stride()}"
        return f"Case({self.q.dtype}, {shapes}, {self.mask}, {sorted(self.kwargs)}, dlse={self.dlse is not None})"


def _layout(rng: random.Random, t: Tensor) -> Tensor:
    """The same values in another layout: BSHD, a view of BHSD, a slice of a fused projection, rows apart."""
    kind = rng.randrange(4)
    if kind == 1:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == 2:
        wide = torch.full((*t.shape[:3], 3 * t.shape[3]), float("nan"), dtype=t.dtype)
        wide[..., t.shape[3] : 2 * t.shape[3]] = t
        return wide[..., t.shape[3] : 2 * t.shape[3]]
    if kind == 3:
        wide = torch.full((t.shape[0], 2 * t.shape[1], *t.shape[2:]), float("nan"), dtype=t.dtype)
        wide[:, ::2] = t
        return wide[:, ::2]
    return t


def _mask(rng: random.Random, gen: torch.Generator, lead: tuple[int, int], sq: int, sk: int) -> TileMask | None:
    kind = rng.randrange(6)
    block = rng.choice(BLOCKS)
    batch, heads = (rng.choice((1, n)) for n in lead)
    if kind == 0:
        return None
    if kind == 1:
        return TileMask.full((sq, sk), block)
    if kind == 2:
        shape = (batch, heads, -(-sq // block[0]), -(-sk // block[1]))
        return TileMask.from_tiles(torch.rand(shape, generator=gen) < 0.4, (sq, sk), block)
    if kind == 3 and sq == sk:
        order = TokenOrder((sq,), None)
        return TileMask.from_rule(GridWindow(order, rng.choice((0, 3, 20)), "band"), (sq, sk), block)
    elements = torch.rand(batch, heads, sq, sk, generator=gen) < rng.choice((0.02, 0.3, 0.95))
    if kind == 4:
        elements[:, :, : sq // 2] = False  # rows and tiles of nothing
    return TileMask.from_bool(elements, block, unique=rng.random() < 0.8)


def random_case(seed: int, *, most: int = 150, dtypes: tuple = DTYPES, dims: tuple = HEAD_DIMS) -> Case:
    """The case of a seed."""
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [n for n in LENGTHS if n <= most]
    dtype, width = rng.choice(dtypes), rng.choice(dims)
    batch, kv_heads, group = rng.choice((1, 1, 2, 3)), rng.choice((1, 2)), rng.choice((1, 1, 2, 4))
    heads = kv_heads * group
    sq, sk = rng.choice(lengths), rng.choice(lengths)
    if rng.random() < 0.4:
        sk = sq

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen).to(dtype)

    q, k, v = values(batch, sq, heads, width), values(batch, sk, kv_heads, width), values(batch, sk, kv_heads, width)
    mask = _mask(rng, gen, (batch, heads), sq, sk)
    kept = torch.ones(1, 1, sq, sk, dtype=torch.bool) if mask is None else mask.to_bool()
    kwargs: dict[str, Any] = {}
    if rng.random() < 0.3:
        kwargs["scale"] = rng.choice((0.05, 0.3))
    if rng.random() < 0.3:
        shape = [n if rng.random() < 0.6 else 1 for n in (batch, heads, sq, sk)]
        kwargs["bias"] = torch.randn(shape, generator=gen).to(rng.choice((dtype, torch.float32)))
    elif rng.random() < 0.2:
        table = torch.randn(rng.choice((1, heads)), sq + sk, generator=gen)
        q_at, k_at = torch.arange(sq, dtype=torch.int32) + sk, torch.arange(sk, dtype=torch.int32)
        kwargs["relpos"] = ops.RelativePosition(table, q_at, k_at)
    dlse = torch.randn(batch, heads, sq, generator=gen) if rng.random() < 0.3 else None
    q, k, v = (_layout(rng, t) for t in (q, k, v))
    return Case(
        q, k, v, mask, kept.expand(batch, heads, sq, sk), _layout(rng, values(batch, sq, heads, width)), dlse, kwargs
    )


def dense(case: Case, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention by torch's own function, and lse by the definition, in the dtype of the arguments."""
    heads, width = q.shape[2], q.shape[3]
    scale = case.kwargs.get("scale", width**-0.5)
    added = torch.zeros(case.kept.shape, dtype=q.dtype) if bias is None else bias.to(q.dtype)
    if "relpos" in case.kwargs:
        table, q_at, k_at = case.kwargs["relpos"].operands(q, k)
        added = added + table.to(q.dtype)[:, (q_at[0][:, None] - k_at[0]).long()]
    added = added.expand(case.kept.shape).masked_fill(~case.kept, -torch.inf)
    empty = ~case.kept.any(-1)
    # A row of nothing is 0 by our definition; torch gives NaN for some kernels and 0 for others.
    safe = added.masked_fill(empty[..., None], 0.0)
    qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))
    kh, vh = (t.repeat_interleave(heads // t.shape[1], 1) for t in (kh, vh))
    out = torch.nn.functional.scaled_dot_product_attention(qh, kh, vh, attn_mask=safe, scale=scale)
    out = out.masked_fill(empty[..., None], 0.0).transpose(1, 2)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = (qh.to(wide) @ kh.to(wide).mT * scale + safe.to(wide)).logsumexp(-1).masked_fill(empty, -torch.inf)
    return out, lse


def evaluate(case: Case, run: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
    """out, lse and the gradients of q, k, v and bias, from `run(q, k, v, bias) -> (out, lse)`."""
    cast = (lambda t: t) if dtype is None else (lambda t: t.to(dtype))
    leaves = [cast(t).detach().requires_grad_() for t in (case.q, case.k, case.v)]
    bias = case.kwargs.get("bias")
    if bias is not None:
        leaves.append(cast(bias).detach().requires_grad_())
    out, lse = run(*leaves[:3], leaves[3] if bias is not None else None)
    loss = (out * cast(case.dout)).sum()
    if case.dlse is not None:
        finite = lse.masked_fill(lse.isneginf(), 0.0)
        loss = loss + (finite * case.dlse.to(finite.dtype)).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [out.detach(), lse.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves))]


def magnitudes(case: Case) -> dict[str, float]:
    """How large the terms are that gradients and lse are sums of, in fp64: where they cancel, rounding shows."""
    q, k, v, dout = (t.double().transpose(1, 2) for t in (case.q, case.k, case.v, case.dout))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    bias = case.kwargs.get("bias")
    out, lse = (
        t.detach()
        for t in dense(case, *(t.double() for t in (case.q, case.k, case.v)), bias if bias is None else bias.double())
    )
    scale = case.kwargs.get("scale", q.shape[-1] ** -0.5)
    s = q @ k.mT * scale + (0 if bias is None else bias.double())
    if "relpos" in case.kwargs:
        table, q_at, k_at = case.kwargs["relpos"].operands(case.q, case.k)
        s = s + table.double()[:, (q_at[0][:, None] - k_at[0]).long()]
    p = (s - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp().masked_fill(~case.kept, 0.0)
    delta = (dout * out.transpose(1, 2)).abs().sum(-1)
    if case.dlse is not None:
        delta = delta + case.dlse.abs()
    ds = p * (dout.abs() @ v.abs().mT + delta[..., None])
    sizes = {"out": p @ v.abs(), "dq": ds @ k.abs() * scale, "dk": ds.mT @ q.abs() * scale, "dv": p.mT @ dout.abs()}
    if bias is not None:
        sizes["dbias"] = ds.sum_to_size(bias.shape)
    sizes["lse"] = q.abs() @ k.abs().mT * scale  # of a row with few keys it is little more than a score
    # A backward forms the probabilities again, as exp(s - lse) in fp32: the roundings of both are factors of them.
    largest = float(lse.masked_fill(lse.isneginf(), 0.0).abs().max()) + float((s * case.kept).abs().max())
    again = torch.finfo(torch.float32).eps / torch.finfo(case.q.dtype).eps * largest
    return {name: (1 + again) * float(size.max()) if size.numel() else 0.0 for name, size in sizes.items()}


def results(case: Case, backend: str | None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The op on a backend, plain torch in the same dtype, and the truth."""
    options = {name: value for name, value in case.kwargs.items() if name != "bias"}

    def op(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Any:
        return ops.tile_attention(q, k, v, case.mask, bias=bias, return_lse=True, backend=backend, **options)

    def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Any:
        return dense(case, q, k, v, bias)

    return evaluate(case, op), evaluate(case, plain), evaluate(case, plain, torch.float64)
