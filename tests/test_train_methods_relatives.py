"""Relatives of MDT: X-MDPT, ITA-MDT, QA-MDT, Yume and MaskGWM, against their equations."""

from __future__ import annotations

import pytest
import torch
from _train_methods import adaln_block, assert_same, attention, double, heads, linear, normal, of, restored, some_tokens
from torch.nn import functional as F

from maskaccel.methods import ita_mdt, maskgwm, qa_mdt, x_mdpt, yume
from maskaccel.methods._transformer import sincos

GRID, N, DIM, HEADS = (4, 6), 24, 16, 2


def bias_of(table, at):
    """Biases of all pairs of tokens at places `(B, n)`, `(B, heads, n, n)`."""
    y, x = at // GRID[1], at % GRID[1]
    dy, dx = (t[:, :, None] - t[:, None] for t in (y, x))
    return table[:, (dy + GRID[0] - 1) * (2 * GRID[1] - 1) + dx + GRID[1] - 1].transpose(0, 1)


def everywhere(batch=2):
    return torch.arange(N).expand(batch, N)


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


# ------------------------------------------------------------------------------------------------------ X-MDPT
def cross_block(p, x, source, c):
    mods = linear(p, "adaLN_modulation.1", F.silu(c))[:, None].chunk(6, -1)
    y = norm(x) * (1 + mods[1]) + mods[0]
    q, (k, v) = (
        heads(linear(p, "attn.q", y), HEADS),
        (heads(t, HEADS) for t in linear(p, "attn.kv", source).chunk(2, -1)),
    )
    x = x + mods[2] * linear(p, "attn.proj", attention(q, k, v, bias_of(p["attn.relative_position"], everywhere())))
    y = norm(x) * (1 + mods[4]) + mods[3]
    return x + mods[5] * linear(p, "mlp.fc2", F.gelu(linear(p, "mlp.fc1", y), approximate="tanh"))


def test_x_mdpt_side_stage():
    model = double(x_mdpt.XMDPTTransformer(DIM, 3, HEADS, GRID, decode_layer=1, mlp_ratio=2.0))
    x, source, c = (
        normal(2, N, DIM).requires_grad_(),
        normal(2, N, DIM, seed=2).requires_grad_(),
        normal(2, DIM, seed=3),
    )
    index, p = some_tokens(2, N, 16), dict(model.named_parameters())

    def block(name, x, at):
        q = of(p, name)
        return adaln_block(q, x, c, HEADS, bias_of(q["attn.relative_position"], at))

    h, s, keep = x + p["pos_embed"], (source + p["pos_embed"]).detach(), index.keep.long()
    h = h.gather(1, keep[..., None].expand(-1, -1, DIM))
    for i in range(2):
        h = block(f"en_inblocks.{i}", h, keep)
        with torch.no_grad():
            s = block(f"en_inblocks.{i}", s, everywhere())
    h = restored(h, index, p["side.mask_token"]) + p["side.decoder_pos_embed"]
    side = cross_block(of(p, "side_cross"), block("side.block", h, everywhere()), s, c)
    h = block("de_blocks.0", torch.where(index.mask[..., None], h, side), everywhere())
    assert_same(model(x, c, source, index), h, [x, *p.values()])
    assert source.grad is None
    model.zero_grad()
    model(x, c, source).sum().backward()
    assert all(q.grad is not None for q in p.values())


# ------------------------------------------------------------------------------------------------------ ITA-MDT
def ita_block(p, x, context, at, skip=None):
    x = x if skip is None else linear(p, "skip_linear", torch.cat([x, skip], -1))
    q, k, v = (heads(t, HEADS) for t in linear(p, "attn.qkv", norm(x)).chunk(3, -1))
    x = x + linear(p, "attn.proj", attention(q, k, v, bias_of(p["attn.relative_position"], at)))
    q, (k, v) = (
        heads(linear(p, "cross.q", norm(x)), HEADS),
        (heads(t, HEADS) for t in linear(p, "cross.kv", context).chunk(2, -1)),
    )
    x = x + linear(p, "cross.proj", attention(q, k, v))
    return x + linear(p, "mlp.fc2", F.gelu(linear(p, "mlp.fc1", norm(x)), approximate="tanh"))


def test_ita_mdt():
    model = double(ita_mdt.ITAMDTTransformer(DIM, 4, HEADS, GRID, decode_layer=2, mlp_ratio=2.0))
    x, context = normal(2, N, DIM).requires_grad_(), normal(2, 5, DIM, seed=2).requires_grad_()
    index, p = some_tokens(2, N, 16), dict(model.named_parameters())
    keep = index.keep.long()
    whole = x + p["pos_embed"]
    h = skip = ita_block(of(p, "en_inblocks.0"), whole.gather(1, keep[..., None].expand(-1, -1, DIM)), context, keep)
    h = ita_block(of(p, "en_outblocks.0"), h, context, keep, skip)
    h = restored(h, index, p["side.mask_token"]) + p["side.decoder_pos_embed"]
    h = torch.where(index.mask[..., None], h, ita_block(of(p, "side.block"), h, context, everywhere()))
    for i in range(2):
        h = ita_block(of(p, f"de_blocks.{i}"), h, context, everywhere(), whole)
    assert_same(model(x, context, index), h, [x, context, *p.values()])


def test_itafa():
    layer, features, t = double(ita_mdt.ITAFA(3, 6)), normal(2, 3, 5, 4) * 0.1, normal(2, 6, seed=2)
    scores = []
    for b in range(2):
        f = features[b]
        dx, dy = f[:, 1:] - f[:, :-1], f[:, :, 1:] - f[:, :, :-1]
        gradient = (dx[:, :, :-1] ** 2 + dy[:, :-1] ** 2).sqrt().mean()
        scores.append(torch.stack([(f.abs() < 0.01).double().mean(), f.var(), gradient]))
    p = dict(layer.named_parameters())
    w = p["alpha"] * linear(p, "of_time", t) + (1 - p["alpha"]) * linear(p, "of_complexity", torch.stack(scores))
    want = (w.softmax(-1)[:, :, None, None] * features).sum(1)
    assert_same(layer(features, t), want, list(p.values()))


# ------------------------------------------------------------------------------------------------------ QA-MDT
def test_rows_and_columns():
    masks = qa_mdt.RowsAndColumns()
    index = masks.choose(3, (50, 32), 4)
    rows, columns = masks.kept((50, 32), 4)
    kept = index.mask.view(3, 50, 32)
    assert index.grid == (rows, columns) and index.kept == rows * columns
    for one in kept:
        assert torch.equal(one, one.any(1)[:, None] & one.any(0)) and one.any(1).sum() == rows
    assert not torch.equal(kept[0], kept[1])
    assert (index.keep.diff(dim=1) > 0).all()  # above 999 tokens too
    pairs = {masks.kept((100, 100), step) for step in range(300)}
    assert {a for a, _ in pairs} == set(range(70, 83))  # floor(83 - 13 u)
    assert {b - a for a, b in pairs} == {2}  # one u for both
    with pytest.raises(ValueError, match="rows="):
        qa_mdt.RowsAndColumns(rows=(0.5, 0.2))


def test_qa_mdt_attends_to_texts_of_different_lengths():
    model = double(qa_mdt.QAMDTTransformer(DIM, 3, HEADS, GRID, decode_layer=1, mlp_ratio=2.0))
    x, c, text = normal(2, N, DIM).requires_grad_(), normal(2, DIM, seed=2), normal(2, 5, DIM, seed=3).requires_grad_()
    index = qa_mdt.RowsAndColumns((0.25, 0.25), (0.34, 0.34)).choose(2, GRID, 0)
    lengths, p = torch.tensor([5, 2]), dict(model.named_parameters())

    def block(name, x, at, skip=None):
        q = of(p, name)
        x = x if skip is None else linear(q, "skip_linear", torch.cat([x, skip], -1))
        mods = linear(q, "adaLN_modulation.1", F.silu(c))[:, None].chunk(6, -1)
        parts = (heads(t, HEADS) for t in linear(q, "attn.qkv", norm(x) * (1 + mods[1]) + mods[0]).chunk(3, -1))
        a = attention(*parts, bias_of(q["attn.relative_position"], at))
        x = x + mods[2] * linear(q, "attn.proj", a)
        rows = []
        for b, count in enumerate(lengths.tolist()):  # each sample with its own text
            k, v = (heads(t, HEADS) for t in linear(q, "cross.kv", text[b : b + 1, :count]).chunk(2, -1))
            rows.append(attention(heads(linear(q, "cross.q", x[b : b + 1]), HEADS), k, v))
        x = x + linear(q, "cross.proj", torch.cat(rows))
        y = norm(x) * (1 + mods[4]) + mods[3]
        return x + mods[5] * linear(q, "mlp.fc2", F.gelu(linear(q, "mlp.fc1", y), approximate="tanh"))

    keep = index.keep.long()
    assert index.grid == (3, 3)
    whole = x + p["pos_embed"]
    h = skip = block("en_inblocks.0", whole.gather(1, keep[..., None].expand(-1, -1, DIM)), keep)
    h = restored(block("en_outblocks.0", h, keep, skip), index, p["side.mask_token"]) + p["side.decoder_pos_embed"]
    h = torch.where(index.mask[..., None], h, block("side.block", h, everywhere()))
    h = block("de_blocks.0", h, everywhere(), whole)
    assert_same(model(x, c, text, lengths, index), h, [x, text, *p.values()])
    assert_same(model(x, c, text), model(x, c, text, torch.tensor([5, 5])))


# ------------------------------------------------------------------------------------------------------ Yume
@pytest.mark.parametrize("per_token", [False, True])
def test_yume_gathers_modulation_and_positions(per_token):
    model = double(yume.YumeTransformer(DIM, 3, HEADS, 2.0, qk_norm="rms"))
    x, index, p = normal(2, N, DIM).requires_grad_(), some_tokens(2, N, 16), dict(model.named_parameters())
    c = (normal(2, N, DIM, seed=2) if per_token else normal(2, DIM, seed=2)).requires_grad_()
    angles = torch.outer(torch.arange(N).double(), torch.tensor([1.0, 0.3, 0.1, 0.03]))

    def block(name, x, c, at):
        q = of(p, name)
        mods = linear(q, "adaLN_modulation.1", F.silu(c))
        mods = (mods if mods.dim() == 3 else mods[:, None]).chunk(6, -1)
        y = norm(x) * (1 + mods[1]) + mods[0]
        a, b, v = (heads(t, HEADS) for t in linear(q, "attn.qkv", y).chunk(3, -1))

        def turn(t, weight):
            t = t * (t.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
            turned = torch.polar(torch.ones_like(angles), angles)[at][:, None]
            pairs = torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * turned).flatten(-2)

        x = x + mods[2] * linear(q, "attn.proj", attention(turn(a, q["attn.q_norm"]), turn(b, q["attn.k_norm"]), v))
        y = norm(x) * (1 + mods[4]) + mods[3]
        return x + mods[5] * linear(q, "mlp.fc2", F.gelu(linear(q, "mlp.fc1", y), approximate="tanh"))

    keep = index.keep.long()
    h, here = x.gather(1, keep[..., None].expand(-1, -1, DIM)), c
    if per_token:
        here = c.gather(1, keep[..., None].expand(-1, -1, DIM))
    for i in range(2):  # block (L + 1) / 2 = 2 sees all tokens
        h = block(f"blocks.{i}", h, here, keep)
    h = restored(h, index, p["mask_token"])
    h = torch.where(index.mask[..., None], h, block("side", h, c, everywhere()))
    h = block("blocks.2", h, c, everywhere())
    rope = (angles.cos().float(), angles.sin().float())
    assert_same(model(x, c, rope, index), h, [x, c, *p.values()], 1e-6)  # rotations are given in fp32
    shared = some_tokens(1, N, 16)
    torch.testing.assert_close(model(x, c, rope, shared), model(x, c, rope, shared.expand(2)))
    layer = model.side.attn
    for at in (
        None,
        torch.arange(N, dtype=torch.int32).flip(0),
        torch.stack([torch.randperm(N) for _ in range(2)]).int(),
    ):
        for rows in (index, shared):
            whole = layer(x, rope=(*rope, at))
            torch.testing.assert_close(layer(x, rows=rows, rope=(*rope, at)), rows.gather(whole), rtol=1e-6, atol=1e-6)
    model.zero_grad()
    model(x, c, rope).sum().backward()
    assert all(q.grad is not None for q in p.values())


# ------------------------------------------------------------------------------------------------------ MaskGWM
VIDEO = (3, 4, 8)


def positions():
    """Of a frame and of a place in it: a quarter of the channels, and the others."""
    time, place = sincos((3,), 4)[0], sincos((4, 8), 12)[0]
    return torch.stack([torch.cat([time[f], place[i]]) for f in range(3) for i in range(32)])[None].double()


@pytest.mark.parametrize("kind", ["constant", "frames", "rows", "mixed"])
def test_maskgwm_masks(kind):
    masks = maskgwm.MaskGWMMasks(0.25, kind)
    index = masks.choose(8, VIDEO, 2)
    kept = index.mask.view(8, *VIDEO)
    assert index.kept == 72 and (kept.sum((2, 3)) == 24).all()
    if kind != "frames":
        assert (kept.sum(3) == 6).all() and index.grid == (3, 4, 6)
    constant = (kept == kept[:, :1]).flatten(1).all(1)
    assert torch.equal(constant, masks.shared(8, 2))
    assert constant.all() == (kind == "constant") and constant.any() == (kind in ("constant", "mixed"))
    rebuilt = torch.zeros_like(index.mask).scatter(1, index.keep.long(), True)
    assert torch.equal(rebuilt, index.mask) and (index.keep.diff(dim=1) > 0).all()
    slots = index.inverse[index.mask].view(8, 72)
    assert torch.equal(slots, torch.arange(72, dtype=torch.int32).expand(8, -1))
    with pytest.raises(ValueError, match="kind='x'"):
        maskgwm.MaskGWMMasks(kind="x")


@pytest.mark.parametrize("temporal", [False, True])
def test_maskgwm_reconstruction(temporal):
    model = double(maskgwm.MaskGWMReconstruction(DIM, HEADS, VIDEO, noise=5, temporal=temporal, mlp_ratio=2.0))
    masks = maskgwm.MaskGWMMasks(0.25, "mixed")
    index, shared = masks.choose(3, VIDEO, 5), masks.shared(3, 5)
    x, c = normal(3, index.kept, DIM).requires_grad_(), normal(3, DIM, seed=2)
    noise, t, p = normal(3, 96, 5, seed=3), torch.tensor([0.0, 250.0, 1000.0]).double(), dict(model.named_parameters())
    part = (t / 1000)[:, None, None]
    tokens = linear(p, "noise_proj", noise) * part + p["mask_token"] * (1 - part)
    tokens = tokens + linear(p, "position_proj", positions())
    keep = index.keep.long()[..., None].expand(-1, -1, DIM)
    full = tokens.scatter(1, keep, x)
    side = adaln_block(of(p, "side"), full.view(9, 32, DIM), c.repeat_interleave(3, 0), HEADS).view(3, 96, DIM)
    if temporal:
        lines = full.view(3, 3, 32, DIM).transpose(1, 2).reshape(96, 3, DIM)
        moved = adaln_block(of(p, "temporal"), lines, c.repeat_interleave(32, 0), HEADS)
        moved = moved.view(3, 32, 3, DIM).transpose(1, 2).reshape(3, 96, DIM)
        side = torch.where(shared[:, None, None], side, moved)
    want = torch.where(index.mask[..., None], full, side)
    assert_same(model(x, c, index, t, noise, shared), want, [x, *p.values()])
    with pytest.raises(ValueError, match="noise must be given"):
        model(x, c, index, t)
