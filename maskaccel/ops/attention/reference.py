"""The attention ops in plain torch, on dense score matrices: the oracle of every test, on any device, in fp64 too.

Arguments are those of `schema.py`. Work in fp64 for fp64 inputs, in fp32 otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .schema import KEEP, MASS, NEED_K, NEED_Q, NEED_S, NEED_V, PRUNE, TOP

_LOG2E = math.log2(math.e)


def pack_words(bits: Tensor) -> Tensor:
    """Bool `(..., n)` as int32 words `(..., ceil(n / 32))`, bit `i % 32` of word `i / 32`."""
    padded = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 32)).unflatten(-1, (-1, 32))
    weights = torch.ones((), dtype=torch.int64, device=bits.device) << torch.arange(32, device=bits.device)
    # Above 2^31 the low 32 bits are those of a negative int32.
    return (padded * weights).sum(-1).to(torch.int32)


def unpack_words(words: Tensor, n: int) -> Tensor:
    """The inverse: bool `(..., n)`."""
    shifts = torch.arange(32, device=words.device, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 1).bool().flatten(-2)[..., :n]


def tile_lists(bits: Tensor, pattern_of: Tensor | None, tiles: int, transpose: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Lists of kept tiles; see `schema.py`."""
    kept = unpack_words(bits, tiles)
    partial = torch.zeros_like(kept) if pattern_of is None else kept & (pattern_of >= 0)
    if transpose:
        kept, partial = kept.mT, partial.mT
    # Partial tiles first, then full ones, then those left out; a stable sort keeps each ascending.
    rank = torch.where(partial, 0, torch.where(kept, 1, 2))
    index = rank.sort(dim=-1, stable=True).indices.to(torch.int32).contiguous()
    count = torch.stack([partial.sum(-1), (kept & ~partial).sum(-1)], dim=-1).to(torch.int32)
    return index, count, line_order(count)


def line_order(count: Tensor) -> Tensor:
    """The order of `schema.py` of lines with these counts `(B, H, M, 2)`."""
    total = count.sum(-1, dtype=torch.int64).flatten(0, 1)  # (slabs, M)
    bits = torch.frexp(total.double()).exponent.long()
    slab = torch.arange(len(total), device=count.device)[:, None]
    key = ((bits + 1) * len(total) - slab << 31) + total
    return key.flatten().sort(descending=True, stable=True).indices.to(torch.int32)


def tile_means(x: Tensor, block: int, alike: bool) -> tuple[Tensor, Tensor]:
    """Means of blocks of tokens, and how alike the tokens of each are."""
    wide = _wide(x)
    missing = -x.shape[1] % block
    counts = torch.full((-(-x.shape[1] // block), 1, 1), block, dtype=wide.dtype, device=x.device)
    counts[-1:] -= missing

    def mean(t: Tensor) -> Tensor:
        return torch.nn.functional.pad(t, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, block)).sum(2) / counts

    # The mean of all products of pairs is the squared length of the mean.
    cosines = wide.new_empty(0)
    if alike:
        cosines = mean(torch.nn.functional.normalize(wide, dim=-1)).square().sum(-1).transpose(1, 2).contiguous()
    return mean(wide).to(x.dtype).contiguous(), cosines


def select_tiles(
    scores: Tensor, force: Any, forbid: Any, limits: Any, rule: int, value: float, min_per_row: int
) -> Tensor:
    """Words of the tiles that a rule keeps."""
    if forbid is not None:
        scores = scores.masked_fill(forbid, -torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device)
    limit = value if limits is None else limits.to(scores)[:, :, None, None]
    if rule == TOP:
        chosen = (places < limit).expand(scores.shape)
    elif rule == MASS:
        mass = order.values.clamp(min=0)
        before = mass.cumsum(-1) - mass
        chosen = before <= limit * mass.sum(-1, keepdim=True)
    else:
        chosen = order.values >= limit
    tiles = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order.indices, chosen | (places < min_per_row))
    if force is not None:
        tiles = tiles | force
    if forbid is not None:
        tiles = tiles & ~forbid
    return pack_words(tiles)


def kept_tiles(index: Tensor, count: Tensor, tiles: int) -> Tensor:
    """Bool `(Bm, Hm, Mq, tiles)` of lists."""
    used = torch.arange(index.shape[-1], device=index.device) < count.sum(-1, keepdim=True)
    # Entries past the counts may hold anything: they go to a column of their own.
    at = torch.where(used, index.long(), tiles)
    kept = torch.zeros((*index.shape[:-1], tiles + 1), dtype=torch.bool, device=index.device)
    return kept.scatter_(-1, at, True)[..., :tiles]


def kept_elements(
    tiles: Tensor, pattern_of: Tensor | None, patterns: Tensor | None, bm: int, bn: int, sq: int, sk: int
) -> Tensor:
    """Bool `(1|B, 1|H, Sq, Sk)` of kept tiles bool `(Bm, Hm, Mq, Nk)` and their patterns."""
    if pattern_of is None or patterns is None:
        return tiles.repeat_interleave(bm, -2).repeat_interleave(bn, -1)[..., :sq, :sk]
    everything = torch.ones((1, bm, bn), dtype=torch.bool, device=tiles.device)
    table = torch.cat([unpack_words(patterns, bn), everything])
    chosen = torch.where(pattern_of < 0, patterns.shape[0], pattern_of.long())
    cut = table[chosen] & tiles[..., None, None]  # (.., Mq, Nk, bm, bn)
    return cut.transpose(-3, -2).flatten(-2).flatten(-3, -2)[..., :sq, :sk]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _heads(x: Tensor, heads: int) -> Tensor:
    """`(B, S, Hk, D)` as wide `(B, H, S, D)`."""
    x = _wide(x).transpose(1, 2)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _scores(q: Tensor, k: Tensor, bias: Any, table: Any, relpos_q: Any, relpos_k: Any, scale: float) -> Tensor:
    heads = q.shape[2]
    s = _heads(q, heads) @ _heads(k, heads).mT * scale
    if bias is not None:
        s = s + bias.to(s.dtype)
    if table is not None:
        at = (relpos_q[:, :, None] - relpos_k[:, None, :]).long()
        s = s + table.to(s.dtype)[:, at].transpose(0, 1)
    return s


def _tiles_of(q: Tensor, k: Tensor, index: Any, count: Any, bm: int, bn: int) -> Tensor:
    rows, columns = math.ceil(q.shape[1] / bm), math.ceil(k.shape[1] / bn)
    if index is None:
        return torch.ones((1, 1, rows, columns), dtype=torch.bool, device=q.device)
    return kept_tiles(index, count, columns)


def tile_attention(
    q: Tensor, k: Tensor, v: Tensor, index: Any, count: Any, order: Any, index_t: Any, count_t: Any, order_t: Any,
    pattern_of: Any, patterns: Any, bias: Any, relpos_table: Any, relpos_q: Any, relpos_k: Any, reference_lse: Any,
    out_scale: Any, out_add: Any, bm: int, bn: int, scale: float, skip_threshold: float, flags: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attention over kept tiles; differentiable by torch's own rules."""
    (batch, sq, heads, _), sk = q.shape, k.shape[1]
    tiles = _tiles_of(q, k, index, count, bm, bn)
    kept = kept_elements(tiles, pattern_of, patterns, bm, bn, sq, sk)
    s = _scores(q, k, bias, relpos_table, relpos_q, relpos_k, scale)
    s = s.masked_fill(~kept, -torch.inf)
    keep = torch.empty(0, dtype=torch.int32, device=q.device)
    if flags & (KEEP | PRUNE):
        with torch.no_grad():
            keep_tiles = _keep_tiles(s.detach(), tiles, index, count, reference_lse, bm, bn, skip_threshold, flags)
        if flags & KEEP:
            keep = pack_words(keep_tiles)
        if flags & PRUNE:
            left_out = ~kept_elements(keep_tiles, None, None, bm, bn, sq, sk)
            s = s.masked_fill(left_out, -torch.inf)
    lse = s.logsumexp(-1)
    nothing = lse.isneginf()
    # exp(-inf + inf) would be NaN, in the gradient too
    p = (s - lse.masked_fill(nothing, 0.0)[..., None]).exp()
    out = (p @ _heads(v, heads)).transpose(1, 2)
    if out_scale is not None:
        out = out * out_scale.to(out.dtype).expand(batch, heads, sq).transpose(1, 2)[..., None]
    if out_add is not None:
        out = out + out_add
    return out.to(q.dtype).contiguous(), lse if q.dtype == torch.float64 else lse.float(), keep


def _keep_tiles(
    s: Tensor, tiles: Tensor, index: Any, count: Any, reference_lse: Any, bm: int, bn: int, threshold: float, flags: int
) -> Tensor:
    """Which visited tiles pass LiteAttention's test, bool `(B, H, Mq, Nk)`."""
    batch, heads, sq, sk = s.shape
    rows, columns = tiles.shape[-2:]
    padded = torch.nn.functional.pad(s, (0, columns * bn - sk, 0, rows * bm - sq), value=-torch.inf)
    top = padded.unflatten(-1, (columns, bn)).amax(-1).unflatten(2, (rows, bm))  # (B, H, Mq, bm, Nk)
    tiles = tiles.expand(batch, heads, rows, columns)
    if reference_lse is not None:
        reference = torch.nn.functional.pad(reference_lse.to(s.dtype), (0, rows * bm - sq)).unflatten(-1, (rows, bm))
        return _passes(top, reference[..., None], threshold).any(3) & tiles
    visits = torch.arange(columns, device=s.device).expand(batch, heads, rows, columns)
    if index is not None:
        visits = index.long()[..., :columns].expand(batch, heads, rows, -1)
        used = torch.arange(visits.shape[-1], device=s.device) < count.sum(-1, keepdim=True)
        visits = torch.where(used, visits, columns)
    keep = torch.zeros((batch, heads, rows, columns + 1), dtype=torch.bool, device=s.device)
    best = top.new_full(top.shape[:-1], -torch.inf)
    top = torch.nn.functional.pad(top, (0, 1), value=-torch.inf)
    for i in range(visits.shape[-1]):
        tile = visits[..., i, None]  # (B, H, Mq, 1)
        local = top.gather(-1, tile[..., None, :].expand(*top.shape[:-1], 1))[..., 0]
        passed = _passes(local, best, threshold).any(-1, keepdim=True)
        keep.scatter_(-1, tile, passed)
        raised = torch.maximum(best, local)
        best = torch.where(passed, raised, best) if flags & PRUNE else raised
    return keep[..., :columns] & tiles


def _passes(local: Tensor, reference: Tensor, threshold: float) -> Tensor:
    something = ~local.isneginf()
    return something & (
        reference.isneginf() | ((local - reference.masked_fill(reference.isneginf(), 0.0)) * _LOG2E > threshold)
    )


def tile_attention_backward(
    dout: Tensor, dlse: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, index: Any, count: Any,
    order: Any, index_t: Any, count_t: Any, order_t: Any, pattern_of: Any, patterns: Any, bias: Any, relpos_table: Any,
    relpos_q: Any, relpos_k: Any, bm: int, bn: int, scale: float, needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients by the formula of `schema.py`."""
    (_, sq, heads, _), (sk, kv_heads) = q.shape, k.shape[1:3]
    tiles = _tiles_of(q, k, index, count, bm, bn)
    kept = kept_elements(tiles, pattern_of, patterns, bm, bn, sq, sk)
    p, s = _probabilities(q, k, lse, kept, bias, relpos_table, relpos_q, relpos_k, scale)
    do, wide_v = _heads(dout, heads), _heads(v, heads)
    delta = (do * _heads(out, heads)).sum(-1)
    if dlse is not None:
        delta = delta - dlse.to(delta.dtype)
    ds = p * (do @ wide_v.mT - delta[..., None])
    none = q.new_empty(0)

    def grouped(x: Tensor) -> Tensor:  # (B, H, Sk, D) summed to (B, Sk, Hk, D)
        return x.unflatten(1, (kv_heads, -1)).sum(2).transpose(1, 2).to(k.dtype).contiguous()

    return (
        (ds @ _heads(k, heads) * scale).transpose(1, 2).to(q.dtype).contiguous() if needs & NEED_Q else none,
        grouped(ds.mT @ _heads(q, heads) * scale) if needs & NEED_K else none,
        grouped(p.mT @ do) if needs & NEED_V else none,
        (ds if q.dtype == torch.float64 else ds.float()) if needs & NEED_S else none.to(s.dtype),
    )


def _probabilities(
    q: Tensor, k: Tensor, lse: Tensor, kept: Tensor, bias: Any, table: Any, relpos_q: Any, relpos_k: Any, scale: float
) -> tuple[Tensor, Tensor]:
    s = _scores(q, k, bias, table, relpos_q, relpos_k, scale).masked_fill(~kept, -torch.inf)
    nothing = lse.isneginf()[..., None]
    p = (s - lse.to(s.dtype)[..., None].masked_fill(nothing, 0.0)).exp()
    return p.masked_fill(nothing, 0.0), s


def attention_column_sums(
    q: Tensor, k: Tensor, lse: Tensor, index_t: Any, count_t: Any, order_t: Any, pattern_of: Any, patterns: Any,
    bias: Any, relpos_table: Any, relpos_q: Any, relpos_k: Any, bm: int, bn: int, scale: float,
) -> Tensor:  # fmt: skip
    """Attention that each key receives."""
    sq, sk = q.shape[1], k.shape[1]
    tiles = _tiles_of(k, q, index_t, count_t, bn, bm).mT
    kept = kept_elements(tiles, pattern_of, patterns, bm, bn, sq, sk)
    return _probabilities(q, k, lse, kept, bias, relpos_table, relpos_q, relpos_k, scale)[0].sum(-2)


def merge_attention(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial results over disjoint keys as one; differentiable by torch's own rules."""
    lse = torch.logaddexp(lse1, lse2)
    w1, w2 = _shares(lse1, lse), _shares(lse2, lse)
    out = _shared(out1, w1) + _shared(out2, w2)
    return out.to(out1.dtype).contiguous(), lse


def _shares(part: Tensor, lse: Tensor) -> Tensor:
    nothing = part.isneginf()
    return torch.where(nothing, 0.0, (part - lse.masked_fill(lse.isneginf(), 0.0)).masked_fill(nothing, 0.0).exp())


def _shared(out: Tensor, weight: Tensor) -> Tensor:
    weight = weight.transpose(1, 2)[..., None]
    # not 0 * out: what a row without keys holds may be anything
    return _wide(out).masked_fill(weight == 0, 0.0) * weight


def merge_attention_backward(
    dout: Tensor, dlse: Any, out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`d lse_i = w_i (dlse + dout . (out_i - out))`, `d out_i = w_i dout`."""
    lse = torch.logaddexp(lse1, lse2)
    w1, w2 = _shares(lse1, lse), _shares(lse2, lse)
    out = _shared(out1, w1) + _shared(out2, w2)
    wide = _wide(dout)
    grads: list[Tensor] = []
    for part, weight in ((out1, w1), (out2, w2)):
        rows = weight.transpose(1, 2)[..., None]
        moved = (wide * (_wide(part).masked_fill(rows == 0, 0.0) - out)).sum(-1).transpose(1, 2)
        if dlse is not None:
            moved = moved + dlse
        grads += [(wide * rows).to(out1.dtype).contiguous(), (moved * weight).to(lse1.dtype).contiguous()]
    return grads[0], grads[1], grads[2], grads[3]


def _phi(x: Tensor, feature_map: int) -> Tensor:
    return torch.nn.functional.elu(x) + 1 if feature_map else x.relu()


def _phi_slope(x: Tensor, feature_map: int) -> Tensor:
    return torch.where(x > 0, 1.0, x.exp() if feature_map else 0.0)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, feature_map: int, normalize: int, eps: float) -> Tensor:
    """Linear attention; differentiable by torch's own rules."""
    heads, count = q.shape[2], max(k.shape[1], 1) if normalize else 1
    fq, fk = _phi(_heads(q, heads), feature_map), _phi(_heads(k, heads), feature_map)
    kv, total = fk.mT @ _heads(v, heads) / count, fk.sum(-2) / count
    z = (fq * total[..., None, :]).sum(-1, keepdim=True) + eps
    return (fq @ kv / z).transpose(1, 2).to(q.dtype).contiguous()


def linear_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, feature_map: int, normalize: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """In closed form: autograd does not record inside an op. `dn = dout / z`, `dz = -(dout . n) / z^2`."""
    heads, kv_heads, count = q.shape[2], k.shape[2], max(k.shape[1], 1) if normalize else 1
    wide_q, wide_k, wide_v, g = (_heads(t, heads) for t in (q, k, v, dout))
    fq, fk = _phi(wide_q, feature_map), _phi(wide_k, feature_map)
    kv, total = fk.mT @ wide_v / count, fk.sum(-2, keepdim=True) / count
    z = (fq * total).sum(-1, keepdim=True) + eps
    dn, dz = g / z, -(g * (fq @ kv)).sum(-1, keepdim=True) / z.square()
    dkv, dtotal = fq.mT @ dn / count, (dz * fq).sum(-2, keepdim=True) / count

    def grouped(x: Tensor) -> Tensor:
        return x.unflatten(1, (kv_heads, -1)).sum(2).transpose(1, 2).to(k.dtype).contiguous()

    dq = _phi_slope(wide_q, feature_map) * (dn @ kv.mT + dz * total)
    dk = _phi_slope(wide_k, feature_map) * (wide_v @ dkv.mT + dtotal)
    return dq.transpose(1, 2).to(q.dtype).contiguous(), grouped(dk), grouped(fk @ dkv)


KERNELS: dict[str, Callable[..., Any]] = {
    "tile_attention": tile_attention,
    "tile_attention_backward": tile_attention_backward,
    "attention_column_sums": attention_column_sums,
    "merge_attention": merge_attention,
    "merge_attention_backward": merge_attention_backward,
    "tile_lists": tile_lists,
    "tile_means": tile_means,
    "select_tiles": select_tiles,
    "linear_attention": linear_attention,
    "linear_attention_backward": linear_attention_backward,
}
