"""Masked autoencoders that diffuse: DiffMAE, UMD, MAR and its cascades, LMD's schedule; against their equations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from _train_methods import (
    adaln_block,
    adaln_linear,
    assert_same,
    attention,
    double,
    heads,
    linear,
    normal,
    of,
    restored,
    some_tokens,
)
from torch.nn import functional as F

from maskaccel.masks import TokenIndex
from maskaccel.methods import diffmae, hi_mar, lmd, mar, mar3d, umd
from maskaccel.methods._transformer import sincos

GRID, N, DIM, HEADS = (4, 6), 24, 16, 2


def layer_norm(p, name, x):
    return F.layer_norm(x, x.shape[-1:], p[name + ".weight"], p[name + ".bias"], 1e-6)


def vit_block(p, x, count=HEADS):
    q, k, v = (heads(t, count) for t in linear(p, "attn.qkv", layer_norm(p, "norm1", x)).chunk(3, -1))
    x = x + linear(p, "attn.proj", attention(q, k, v))
    return x + linear(p, "mlp.fc2", F.gelu(linear(p, "mlp.fc1", layer_norm(p, "norm2", x))))


# ------------------------------------------------------------------------------------------------------ DiffMAE
def decoder_block(p, x, visible, kind):
    if kind == "cross-self":
        q, k, v = (heads(t, HEADS) for t in linear(p, "attn.qkv", layer_norm(p, "norm1", x)).chunk(3, -1))
        x = x + linear(p, "attn.proj", attention(q, k, v))
    k, v = (heads(t, HEADS) for t in linear(p, "cross.kv", visible).chunk(2, -1))
    q = heads(linear(p, "cross.q", layer_norm(p, "norm_cross", x)), HEADS)
    x = x + linear(p, "cross.proj", attention(q, k, v))
    return x + linear(p, "mlp.fc2", F.gelu(linear(p, "mlp.fc1", layer_norm(p, "norm2", x))))


def test_timestep_embedding():
    t = torch.tensor([0.0, 3.0, 40.0])
    angles = t[:, None] * 10000.0 ** (-torch.arange(128) / 128)
    torch.testing.assert_close(diffmae.timestep_embedding(t, 256), torch.cat([angles.cos(), angles.sin()], 1))
    assert diffmae.timestep_embedding(t, 5)[:, 4].abs().max() == 0


@pytest.mark.parametrize("kind", ["joint", "cross", "cross-self"])
def test_diffmae(kind):
    model = double(
        diffmae.DiffMAE(12, GRID, DIM, 2, HEADS, width=8, decoder_depth=2, decoder_heads=2, decoder=kind, mlp_ratio=2.0)
    )
    patches, noised, t = normal(2, N, 12).requires_grad_(), normal(2, 18, 12, seed=2), torch.tensor([3, 900])
    index, p = some_tokens(2, N, 6), dict(model.named_parameters())
    gone = index.complement()

    def take(x, index):
        return x.expand(2, -1, -1).gather(1, index.keep.long()[..., None].expand(-1, -1, x.shape[-1]))

    x = linear(p, "embed", take(patches, index)) + take(sincos(GRID, DIM).double(), index)
    for i in range(2):
        x = vit_block(of(p, f"blocks.{i}"), x)
    visible = linear(p, "to_decoder", layer_norm(p, "norm", x))
    y = linear(p, "embed_noised", noised) + take(sincos(GRID, 8).double(), gone)
    y = y + linear(p, "time.2", F.silu(linear(p, "time.0", diffmae.timestep_embedding(t, 256).double())))[:, None]
    y = torch.cat([visible, y], 1) if kind == "joint" else y
    for i in range(2):
        q = of(p, f"decoder_blocks.{i}")
        y = vit_block(q, y) if kind == "joint" else decoder_block(q, y, visible, kind)
    want = linear(p, "head", layer_norm(p, "decoder_norm", y[:, -18:]))
    encoded = model.encode(patches, index)
    assert_same(model.decode(noised, t, encoded), want, [patches, *p.values()])
    assert len(encoded.memory) == (0 if kind == "joint" else 2)


def test_diffmae_encodes_once_and_reads_no_masked_patch():
    model = double(diffmae.DiffMAE(12, GRID, DIM, 2, HEADS, width=8, decoder_depth=2, decoder_heads=2, mlp_ratio=2.0))
    patches, index, levels = normal(2, N, 12), some_tokens(2, N, 6), diffmae.noise_levels(1000)
    calls = []
    model.blocks[0].register_forward_hook(lambda m, args, out: calls.append(args[0].shape[1]))
    model.decoder_blocks[0].cross.kv.register_forward_hook(lambda m, args, out: calls.append("kv"))
    torch.manual_seed(0)
    out = model.sample(patches, index, [900, 500, 100], levels)
    assert calls == [6, "kv"]  # for three steps
    changed = patches.masked_fill(~index.mask[..., None], math.nan)
    torch.manual_seed(0)
    assert torch.equal(model.sample(changed, index, [900, 500, 100], levels), out)
    assert torch.equal(out[index.mask], patches[index.mask])


def test_diffmae_loss():
    model = double(diffmae.DiffMAE(12, GRID, DIM, 1, HEADS, width=8, decoder_depth=1, decoder_heads=2, mlp_ratio=2.0))
    patches, index, levels = normal(2, N, 12), some_tokens(2, N, 6), diffmae.noise_levels(1000, rho=0.8)
    assert levels[:2].tolist() == pytest.approx([1 - _beta(0), (1 - _beta(0)) * (1 - _beta(1))])
    t, noise = torch.tensor([10, 500]), normal(2, 18, 12, seed=3)
    target = patches.gather(1, index.complement().keep.long()[..., None].expand(-1, -1, 12))
    a = levels[t].double()[:, None, None]
    found = model.decode(a.sqrt() * target + (1 - a).sqrt() * noise, t, model.encode(patches, index))
    torch.testing.assert_close(model.loss(patches, index, t, noise, levels), (found - target).square().mean((1, 2)))
    with pytest.raises(ValueError, match="decoder='other'"):
        diffmae.DiffMAE(12, GRID, decoder="other")


def _beta(step):
    return (1e-4 + (0.02 - 1e-4) * step / 999) ** 0.8


# ------------------------------------------------------------------------------------------------------ UMD
@pytest.mark.parametrize("keep", [6, None])
def test_umd(keep):
    model = double(umd.UMD(DIM, 2, HEADS, GRID, 12, decoder_depth=1, mlp_ratio=2.0))
    x, c = normal(2, N, DIM).requires_grad_(), normal(2, DIM, seed=2)
    index, p = None if keep is None else some_tokens(2, N, keep), dict(model.named_parameters())
    h = x + p["pos_embed"]
    h = h if index is None else h.gather(1, index.keep.long()[..., None].expand(-1, -1, DIM))
    h = torch.cat([p["cls"].expand(2, -1, -1), h], 1)
    for i in range(2):
        h = adaln_block(of(p, f"blocks.{i}"), h, c, HEADS)
    cls, h = h[:, :4].mean(1, keepdim=True), h[:, 4:]
    h = (h if index is None else restored(h, index, p["mask_token"])) + p["decoder_pos_embed"]
    h = adaln_block(of(p, "decoder_blocks.0"), torch.cat([cls, h], 1), c, HEADS)[:, 1:]
    assert_same(model(x, c, index), adaln_linear(of(p, "final_layer"), h, c), [x, *p.values()])
    model(x, c, index).sum().backward()
    assert all(q.grad is not None for q in p.values())


def test_umd_schedule():
    schedule = umd.UMDSchedule(0.25)
    assert schedule.split(8) == (slice(0, 2), slice(2, 8)) and schedule.kept(256) == (64, 128)
    clean, noised = normal(2), normal(6, seed=2)
    torch.testing.assert_close(schedule.loss(clean, noised), 0.25 * clean.mean() + 0.75 * noised.mean())
    torch.testing.assert_close(umd.UMDSchedule(0.0).loss(clean[:0], noised), noised.mean())
    with pytest.raises(ValueError, match="clean_part=2"):
        umd.UMDSchedule(2)


# ------------------------------------------------------------------------------------------------------ MAR
def tiny_mar():
    return double(mar.MAR(4, GRID, DIM, 1, HEADS, buffer=3, mlp_ratio=2.0, head_width=8, head_depth=1))


@pytest.mark.parametrize("masked", [18, N])
def test_mar(masked):
    model = tiny_mar()
    tokens, c = normal(2, N, 4).requires_grad_(), normal(2, DIM, seed=2)
    index, p = model.visible(2, masked, seed=0), dict(model.named_parameters())
    assert index.kept == 3 + N - masked and index.prefix == 3 * (masked < N) and index.mask[:, :3].all()
    x = linear(p, "embed", tokens)
    x = torch.cat([c[:, None].expand(-1, 3, -1), x], 1) + p["pos_embed"]
    x = layer_norm(p, "embed_norm", x)
    keep = index.keep.long().expand(2, -1)[..., None].expand(-1, -1, DIM)
    x = layer_norm(p, "encoder_norm", vit_block(of(p, "encoder_blocks.0"), x.gather(1, keep)))
    x = restored(linear(p, "decoder_embed", x), index.expand(2), p["mask_token"]) + p["decoder_pos_embed"]
    x = layer_norm(p, "decoder_norm", vit_block(of(p, "decoder_blocks.0"), x))[:, 3:] + p["head_pos_embed"]
    found = model.decode(model.encode(tokens, c, index), index)
    assert_same(found, x, [tokens, *(q for name, q in p.items() if not name.startswith("head."))])


def test_mar_loss_is_over_masked_rows():
    model, tokens, c = tiny_mar(), normal(2, N, 4), normal(2, DIM, seed=2)
    index = model.visible(2, 18, seed=0)
    seen = []
    model.head.register_forward_hook(lambda m, args, out: seen.append([len(a) for a in args]))
    loss = model.loss(tokens, c, index, generator=torch.Generator().manual_seed(0))
    assert seen == [[2 * 18 * 4] * 3]
    z, generator = model.decode(model.encode(tokens, c, index), index), torch.Generator().manual_seed(0)
    hidden = ~index.mask[:, 3:]
    z, target = (t[hidden].repeat(4, 1) for t in (z, tokens))
    t = torch.randint(1000, (len(z),), generator=generator)
    noise = torch.randn(target.shape, generator=generator, dtype=torch.float64)
    at = torch.tensor([math.cos((s / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for s in range(1001)])
    level = (1 - (1 - at[1:] / at[:-1]).clamp(max=0.999)).cumprod(0)[t][:, None].double()
    predicted = model.head(level.sqrt() * target + (1 - level).sqrt() * noise, t, z)
    torch.testing.assert_close(loss, (predicted - noise).square().mean(), rtol=1e-4, atol=1e-4)


def test_mask_counts_of_sampling():
    counts = mar.mask_counts(256, 64)
    want = [256]
    for step in range(63):
        want.append(max(1, min(want[-1] - 1, math.floor(256 * math.cos(math.pi / 2 * (step + 1) / 64)))))
    assert counts == [*want, 0] and len(counts) == 65
    bucketed = mar.mask_counts(256, 64, bucket=16)
    assert bucketed[0] == 256 and bucketed[-1] == 0 and all((256 - c) % 16 == 0 for c in bucketed[:-1])
    assert bucketed == sorted(set(bucketed), reverse=True)
    assert mar.mask_counts(1, 1) == [1, 0]
    with pytest.raises(ValueError, match="steps=300"):
        mar.mask_counts(256, 300)


def test_mar_sampling_reveals_nested_sets_and_guides_linearly():
    model = tiny_mar()
    seen, scales = [], []
    sample = model.head.sample

    def spy(z, steps, **kwargs):
        scales.append((len(z), kwargs["guidance"]))
        return sample(z, steps, **kwargs)

    model.head.sample = spy
    c, null = normal(2, DIM), normal(2, DIM, seed=3)
    options = {"steps": 5, "guidance": 3.0, "head_steps": 4, "seed": 1}
    out = model.sample(
        c, null, generator=torch.Generator().manual_seed(0), on_step=lambda x, i: seen.append((x, i)), **options
    )
    counts = mar.mask_counts(N, 5)
    assert [index.kept - 3 for _, index in seen] == [N - k for k in counts[:-1]]
    masks = [index.mask.expand(2, -1)[:, 3:] for _, index in seen]
    assert all((later | ~earlier).all() for earlier, later in itertools.pairwise(masks))
    assert not torch.equal(masks[2][0], masks[2][1])
    for (x, _), mask in zip(seen, masks):
        assert torch.equal(x[mask], out[mask]) and x[~mask].abs().max() == 0  # what was revealed stays
    revealed = [a - b for a, b in itertools.pairwise(counts)]
    want = [1 + 2.0 * (N - max(k, 1)) / N for k in counts[1:]]
    assert [rows for rows, _ in scales] == [2 * 2 * k for k in revealed]
    assert [scale for _, scale in scales] == pytest.approx(want)
    with pytest.raises(ValueError, match="guidance=2"):
        model.sample(c, guidance=2.0)


def test_head_samples_what_it_was_told():
    """A head whose noise prediction belongs to one clean value gives that value."""
    head = mar.DiffusionHead(3, 5, 8, 1).double()
    clean = normal(4, 3)
    levels = head.levels.double()

    def exact(x, t, z):
        level = levels[t][:, None]
        return (x - level.sqrt() * clean.repeat(len(x) // 4, 1)) / (1 - level).sqrt()

    head.forward = exact
    z = torch.zeros(4, 5, dtype=torch.float64)
    torch.testing.assert_close(head.sample(z, 50), clean)
    torch.testing.assert_close(head.sample(torch.cat([z, z]), 50, guidance=2.0), clean)


# ------------------------------------------------------------------------------------------------------ LMD
def squared(q):
    return math.cos((q + 0.008) / 1.008 * math.pi / 2) ** 2


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("linear", [0.2, 0.275, 0.35, 0.5, 0.8, 0.8]),
        ("piecewise", [0.2, 0.3, 0.4, 0.4, 0.8, 0.8]),
        ("cosine", [0.2, *(0.2 + 0.6 * (1 - squared(q) / squared(0)) for q in (1 / 8, 1 / 4, 1 / 2)), 0.8, 0.8]),
    ],
)
def test_lmd_schedules(kind, want):
    schedule = lmd.LMDSchedule(0.2, 0.8, 120, kind)
    assert [schedule.ratio(step) for step in (0, 10, 20, 40, 80, 120)] == pytest.approx(want)
    ratios = [schedule.ratio(step) for step in range(121)]
    assert ratios == sorted(ratios)
    assert {schedule.kept(256, step) % 16 for step in range(101)} == {0}
    with pytest.raises(ValueError, match="kind='uniform'"):
        lmd.LMDSchedule(kind="uniform")
    with pytest.raises(ValueError, match=r"passes 0\.4"):
        lmd.LMDSchedule(0.5, 0.6, kind="piecewise")


def test_index_of_the_buffer_alone():
    index = tiny_mar().visible(2, N, seed=0)
    assert index.kept == 3 and torch.equal(index.keep, torch.tensor([[0, 1, 2]], dtype=torch.int32))
    assert isinstance(index, TokenIndex)


# ------------------------------------------------------------------------------------------------------ cascades
def cascade(kind=hi_mar.HiMAR, **options):
    low = mar.MAR(4, (2, 3), DIM, 1, HEADS, buffer=3, mlp_ratio=2.0, head_width=8, head_depth=1)
    high = mar.MAR(5, GRID, DIM, 1, HEADS, buffer=8, mlp_ratio=2.0, head_width=8, head_depth=1)
    return double(kind(low, high, **options))


def test_hi_mar_is_given_the_pivots():
    model = cascade()
    pivots, tokens, c = normal(2, 6, 4), normal(2, N, 5, seed=2), (normal(2, DIM), normal(2, DIM, seed=3))
    context = model.context(c[1], pivots)
    assert context.shape == (2, 8, DIM) and torch.equal(context[:, 0], c[1]) and torch.equal(context[:, 1], c[1])
    torch.testing.assert_close(context[:, 2:], model.pivot_embed(pivots))
    indices = (model.low.visible(2, 4, seed=0), model.high.visible(2, 18, seed=0))
    generator = torch.Generator().manual_seed(0)
    want = model.low.loss(pivots, c[0], indices[0], generator=generator)
    want = want + model.high.loss(tokens, context, indices[1], generator=generator)
    found = model.loss(pivots, tokens, c, indices, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, want)
    found.backward()
    assert model.pivot_embed.weight.grad.abs().max() > 0
    options = {"head_steps": 3, "guidance": 2.0}
    low, high = model.sample(c, c, low={"steps": 3, **options}, high={"steps": 4, **options})
    assert low.shape == (2, 6, 4) and high.shape == (2, N, 5) and high.isfinite().all()
    with pytest.raises(ValueError, match="buffer of 3"):
        hi_mar.HiMAR(model.high, model.low)
    with pytest.raises(ValueError, match=r"condition has shape \(2, 3, 16\)"):
        model.high.encode(tokens, context[:, :3], indices[1])


def test_mar3d_noises_what_it_is_given_in_training():
    model, pivots = cascade(mar3d.MAR3D, augment=0.25), normal(4, 6, 4)
    given = model.given(pivots, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    t = 1 - 0.25 * torch.rand(4, 1, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(4, 6, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(given, t * pivots + (1 - t) * noise)
    assert model.eval().given(pivots) is pivots
    with pytest.raises(ValueError, match="augment=2"):
        cascade(mar3d.MAR3D, augment=2)
