"""SPRINT, MaskDiT and MicroDiT: the modules of each paper against its equations."""

from __future__ import annotations

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
from torch import nn
from torch.nn import functional as F

from maskaccel.masks import TokenIndex
from maskaccel.methods import maskdit, microdit, sprint
from maskaccel.methods._masked_rows import patches, per_token, token_mean, unpatch
from maskaccel.methods._ratios import RatioSchedule, TruncatedNormal, kept_tokens, uniform
from maskaccel.methods._transformer import sincos
from maskaccel.ops import random_keep

N, DIM, HEADS = 24, 16, 2


# ------------------------------------------------------------------------------------------------------ SPRINT
@pytest.mark.parametrize("learn_mask", [False, True])
def test_fusion_is_the_linear_layer_of_the_concatenation(learn_mask):
    fusion = double(sprint.SprintFusion(DIM, learn_mask=learn_mask))
    f, g, index = normal(3, N, DIM).requires_grad_(), normal(3, 6, DIM, seed=2).requires_grad_(), some_tokens(3, N, 6)
    keep = torch.tensor([True, False, True])
    assert fusion.mask_token.requires_grad == learn_mask

    def formula(path_keep):
        padded = restored(g, index, fusion.mask_token)
        if path_keep is not None:
            padded = torch.where(path_keep[:, None, None], padded, fusion.mask_token)
        return F.linear(torch.cat([padded, f], -1), fusion.weight, fusion.bias)

    leaves = [f, g, *(p for p in fusion.parameters() if p.requires_grad)]
    for path_keep in (None, keep, torch.zeros(3, dtype=torch.bool)):
        gradients = assert_same(fusion(f, g, index, path_keep), formula(path_keep), leaves)
        if learn_mask:
            assert gradients[-1].abs().max() > 0
    # a sample whose path is dropped tells g nothing
    fusion(f, g, index, keep)[1].sum().backward()
    assert g.grad.abs().max() == 0 and f.grad[1].abs().max() > 0


def test_fusion_of_all_tokens_and_the_unconditional_form():
    fusion = double(sprint.SprintFusion(DIM, learn_mask=True))
    f, g = normal(2, N, DIM).requires_grad_(), normal(2, N, DIM, seed=2)
    assert_same(fusion(f, g), F.linear(torch.cat([g, f], -1), fusion.weight, fusion.bias), [f])
    some = torch.tensor([True, False])
    dropped = torch.where(some[:, None, None], g, fusion.mask_token)
    want = F.linear(torch.cat([dropped, f], -1), fusion.weight, fusion.bias)
    assert_same(fusion(f, g, TokenIndex.all(N), some), want, [f, *fusion.parameters()])
    fusion(f, g).sum().backward()
    assert fusion.mask_token.grad.abs().max() == 0  # there, but not used

    padded = fusion.mask_token.expand_as(f)
    want = F.linear(torch.cat([padded, f], -1), fusion.weight, fusion.bias)
    assert_same(fusion.without_middle(f), want, [f, *fusion.parameters()])
    both = fusion.guided(torch.cat([f, f + 1]), g)
    torch.testing.assert_close(both, torch.cat([fusion(f, g), fusion.without_middle(f + 1)]))


def test_path_drops_are_of_training_and_of_the_sample():
    fusion = sprint.SprintFusion(DIM, path_drop=0.25)
    drawn = torch.stack([fusion.draw(1000, step) for step in range(4)])
    assert drawn.dtype == torch.bool and abs(drawn.float().mean() - 0.75) < 0.03
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(fusion.draw(10, 3, offset=20), drawn[3, 20:30])  # whatever the rank
    assert torch.equal(fusion.draw(10, torch.tensor(3)), drawn[3, :10])
    assert fusion.eval().draw(4, 0) is None and sprint.SprintFusion(DIM, path_drop=0).draw(4, 0) is None
    with pytest.raises(ValueError, match="path_drop=1"):
        sprint.SprintFusion(DIM, path_drop=1.0)


@pytest.mark.parametrize(("ratio", "cell", "kept"), [(0.5, 2, 2), (0.625, 4, 6), (0.75, 2, 1), (0.875, 4, 2)])
def test_cells(ratio, cell, kept):
    index = sprint.cell_index(3, (8, 12), ratio, seed=1, step=2)
    assert index.kept == round(96 * (1 - ratio))
    inside = index.mask.unflatten(1, (8 // cell, cell, 12 // cell, cell))
    assert (inside.sum((2, 4)) == kept).all()
    assert not torch.equal(index.keep[0], index.keep[1])
    # the patch, which leaves the choice of the cell to the draw
    again = random_keep(3, 96, 1 - ratio, seed=1, step=2, scheme="cell", grid=(8, 12))
    assert torch.equal(again.keep, index.keep)


def test_cells_of_a_video():
    index = sprint.cell_index(2, (4, 4, 6), seed=1)
    assert torch.equal(random_keep(2, 96, 0.25, seed=1, scheme="cell", grid=(4, 4, 6)).keep, index.keep)
    inside = index.mask.unflatten(1, (2, 2, 2, 2, 3, 2))
    assert (inside.sum((2, 4, 6)) == 2).all()
    with pytest.raises(ValueError, match=r"ratio=0.6 on the grid \(8, 8\)"):
        sprint.cell_index(1, (8, 8), 0.6, seed=0)


def test_guide():
    c, u = normal(2, 3), normal(2, 3, seed=2)
    torch.testing.assert_close(sprint.guide(c, u, 3.0), u + 3 * (c - u))


# ------------------------------------------------------------------------------------------------------ MaskDiT
def test_positions_are_those_of_mae():
    def one(places, dim):
        angle = places[:, None] * 10000.0 ** (-torch.arange(dim // 2).double() / (dim // 2))
        return torch.cat([angle.sin(), angle.cos()], 1)

    y, x = (t.flatten().double() for t in torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij"))
    torch.testing.assert_close(sincos((4, 6), 16)[0], torch.cat([one(x, 8), one(y, 8)], 1).float())
    # 10 pairs for three axes: 4, 3 and 3
    z = sincos((2, 4, 6), 20)[0]
    assert z.shape == (48, 20)
    torch.testing.assert_close(z[:24], torch.cat([one(x, 8), one(y, 6), one(0 * x, 6)], 1).float())
    for bad in (7, 4):
        with pytest.raises(ValueError, match=f"dim={bad}"):
            sincos((2, 4, 6), bad)


def maskdit_model():
    return double(
        maskdit.MaskDiTTransformer(
            DIM, 2, HEADS, (4, 6), 8, mlp_ratio=2.0, decoder_width=8, decoder_depth=2, decoder_heads=2
        )
    )


@pytest.mark.parametrize("keep", [12, None])
def test_maskdit_is_encoder_restore_decoder(keep):
    model = maskdit_model()
    x, c = normal(2, N, DIM).requires_grad_(), normal(2, DIM, seed=2)
    index = None if keep is None else some_tokens(2, N, keep)
    p = dict(model.named_parameters())

    h = x + sincos((4, 6), DIM).double()
    h = h if index is None else h.gather(1, index.keep.long()[..., None].expand(-1, -1, DIM))
    for i in range(2):
        h = adaln_block(of(p, f"blocks.{i}"), h, c, HEADS)
    h = adaln_linear(of(p, "decoder.decoder_layer"), h, c)
    h = (h if index is None else restored(h, index, p["decoder.mask_token"])) + sincos((4, 6), 8).double()
    for i in range(2):
        h = adaln_block(of(p, f"decoder.decoder_blocks.{i}"), h, c, 2)
    assert_same(model(x, c, index), adaln_linear(of(p, "decoder.final_layer"), h, c), [x, *p.values()])
    model(x, c, index).sum().backward()
    assert all(q.grad is not None for q in model.parameters())  # the mask token too, where nothing is masked


def test_maskdit_loss_is_equation_4():
    patch, index = 2, some_tokens(2, 12, 6)
    clean, noise, denoised = normal(2, 3, 6, 8), normal(2, 3, 6, 8, seed=2), normal(2, 3, 6, 8, seed=3)
    sigma = torch.tensor([0.3, 2.0], dtype=torch.float64)
    noised = clean + sigma[:, None, None, None] * noise
    want = []
    for b in range(2):
        w = (sigma[b] ** 2 + 0.25) / (sigma[b] * 0.5) ** 2
        kept, dropped = [], []
        for t in range(12):
            y, x = 2 * (t // 4), 2 * (t % 4)
            at = (b, slice(None), slice(y, y + 2), slice(x, x + 2))
            if index.mask[b, t]:
                kept.append((w * (denoised[at] - clean[at]) ** 2).mean())
            else:
                target = (noised[at] - noised[at].mean()) / (noised[at].var() + 1e-6).sqrt()
                dropped.append(((denoised[at] - target) ** 2).mean())
        want.append(torch.stack(kept).mean() + 0.1 * torch.stack(dropped).mean())
    found = maskdit.maskdit_loss(denoised, clean, noised, sigma, index, patch)
    torch.testing.assert_close(found, torch.stack(want))
    dense = maskdit.maskdit_loss(denoised, clean, noised, sigma, None, patch)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    torch.testing.assert_close(dense, weight * (denoised - clean).square().mean((1, 2, 3)))
    with pytest.raises(ValueError, match="patch=5"):
        maskdit.maskdit_loss(denoised, clean, noised, sigma, index, 5)


def test_edm_preconditioning():
    x, sigma = normal(2, 3, 4, 4), torch.tensor([0.5, 3.0], dtype=torch.float64)
    seen = {}

    def net(scaled, level, label):
        seen.update(scaled=scaled, level=level, label=label)
        return scaled * 2

    found = maskdit.edm_preconditioned(net, x, sigma, "label")
    for b, s in enumerate(sigma.tolist()):
        scaled = x[b] / math.sqrt(0.25 + s * s)
        torch.testing.assert_close(seen["scaled"][b], scaled)
        want = 0.25 / (s * s + 0.25) * x[b] + s * 0.5 / math.sqrt(s * s + 0.25) * 2 * scaled
        torch.testing.assert_close(found[b], want)
    torch.testing.assert_close(seen["level"], sigma.log() / 4)


def test_losses_by_index():
    values, index = normal(2, N), some_tokens(2, N, 9)
    torch.testing.assert_close(
        token_mean(values, index), torch.stack([v[m].mean() for v, m in zip(values, index.mask)])
    )
    dropped = torch.stack([v[~m].mean() for v, m in zip(values, index.mask)])
    torch.testing.assert_close(token_mean(values, index, dropped=True), dropped)
    torch.testing.assert_close(token_mean(index.gather(values), index), token_mean(values, index))
    assert token_mean(values, TokenIndex.all(N), dropped=True).abs().max() == 0
    with pytest.raises(ValueError, match=r"values has shape \(2, 5\)"):
        token_mean(values[:, :5], index)
    image = normal(2, 3, 4, 6)
    torch.testing.assert_close(unpatch(patches(image, 2), (2, 3), 2), image)
    torch.testing.assert_close(per_token(image, 2), patches(image, 2).mean(-1))


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("constant", [0.5, 0.5, 0.5]),
        ("linear", [0.5, 0.3, 0.1]),
        ("cosine", [0.5, 0.1 + 0.4 * math.cos(math.pi / 4) ** 4, 0.1]),
        ("exp", [0.5, 0.1 + 0.4 * math.exp(-3.5), 0.1 + 0.4 * math.exp(-7)]),
    ],
)
def test_ratio_schedules(kind, want):
    schedule = RatioSchedule(0.5, 0.1, 100, kind)
    assert [schedule.ratio(step) for step in (0, 50, 100)] == pytest.approx(want)
    assert schedule.kept(256, 0) == 128


def test_kept_tokens():
    assert [kept_tokens(256, r) for r in (0.75, 0.5, 0.3)] == [64, 128, 179]
    assert [kept_tokens(256, r, 16) for r in (0.99, 0.3, 0.0)] == [16, 176, 256]
    with pytest.raises(ValueError, match="ratio=1"):
        kept_tokens(256, 1.0)
    with pytest.raises(ValueError, match="kind='step'"):
        RatioSchedule(kind="step")


def test_truncated_normal():
    ratio = TruncatedNormal()
    found = torch.tensor([ratio.ratio(step) for step in range(4000)])
    assert found.min() >= 0.7 and found.max() <= 1
    # mean of a normal distribution cut off to [mean - 1.2 sd, mean]
    density = lambda z: math.exp(-z * z / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    mass = 0.5 * math.erf(1.2 / math.sqrt(2))
    assert found.mean() == pytest.approx(1 - 0.25 * (density(0) - density(1.2)) / mass, abs=0.005)
    assert ratio.masked(256, 3) == math.ceil(256 * ratio.ratio(3))
    assert uniform(5, seed=1, step=2).unique().numel() == 5


# ------------------------------------------------------------------------------------------------------ MicroDiT
def test_experts_choose_their_tokens():
    mlp = double(microdit.ExpertChoiceMLP(DIM, 12, experts=4, capacity=2.0))
    x = normal(2, 10, DIM).requires_grad_()
    assert [mlp.tokens(n) for n in (256, 64, 10, 1)] == [128, 32, 5, 1]
    probability = F.linear(x, mlp.gate.weight).softmax(-1)
    want = torch.zeros_like(x)
    for b in range(2):
        for e in range(4):
            chosen = probability[b, :, e].topk(5).indices
            y = F.gelu(x[b, chosen] @ mlp.w1[e]) @ mlp.w2[e]
            want = want.index_put((torch.tensor(b), chosen), probability[b, chosen, e, None] * y, accumulate=True)
    assert_same(mlp(x), want, [x, *mlp.parameters()], 1e-6)  # probabilities are formed in fp32


@pytest.mark.parametrize("experts", [0, 4])
def test_microdit_block(experts):
    block = double(microdit.MicroDiTBlock(DIM, HEADS, 48, context=12, experts=experts, multiple=8))
    x, context, c = normal(2, 9, DIM).requires_grad_(), normal(2, 5, 12, seed=2), normal(2, DIM, seed=3)
    p = dict(block.named_parameters())

    def normed(x, name):
        return F.layer_norm(x, (DIM,), p[name + ".weight"], p[name + ".bias"], 1e-6)

    def attend(q, k, v):
        q, k = (F.layer_norm(t, (DIM,), eps=1e-6) for t in (q, k))
        return attention(*(heads(t, HEADS) for t in (q, k, v)))

    mods = linear(p, "adaLN_modulation.1", F.gelu(c, approximate="tanh"))[:, None].chunk(6, -1)
    h = x + mods[2] * linear(
        p, "proj", attend(*linear(p, "qkv", normed(x, "norm1") * (1 + mods[1]) + mods[0]).chunk(3, -1))
    )
    k, v = linear(p, "kv_cross", context).chunk(2, -1)
    h = h + linear(p, "proj_cross", attend(linear(p, "q_cross", normed(h, "norm2")), k, v))
    y = normed(h, "norm3") * (1 + mods[4]) + mods[3]
    if experts:
        y = block.mlp(y)
    else:
        gate, value = linear(p, "mlp.w12", y).chunk(2, -1)
        y = linear(p, "mlp.w3", F.silu(gate) * value)
    assert_same(block(x, context, c), h + mods[5] * y, [x, *p.values()], 1e-6 if experts else 1e-9)


def test_microdit_drops_behind_the_mixer():
    model = double(
        microdit.MicroDiTTransformer(DIM, 2, 8, 12, experts=4, multiple=8, mlp_ratio=2.0, mixer_width=24, context=20)
    )
    assert len(model.mixer.blocks) == 6
    experts = [isinstance(b.mlp, microdit.ExpertChoiceMLP) for b in (*model.mixer.blocks, *model.blocks)]
    assert experts == [False, True] * 3 + [False, False]
    x, context, c, index = normal(2, N, DIM), normal(2, 3, 20), normal(2, DIM), some_tokens(2, N, 6)
    seen = []
    for block in (*model.mixer.blocks, *model.blocks):
        block.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    out = model(x, context, c, index)
    assert out.shape == (2, 6, 12) and seen == [N] * 6 + [6] * 2
    # kept tokens know of the dropped ones, through the mixer
    changed = x.clone()
    changed[~index.mask] *= -1
    assert (model(changed, context, c, index) - out).abs().max() > 1e-3


def test_loss_over_kept_patches():
    clean, noised, index = normal(2, 3, 4, 6), normal(2, 3, 4, 6, seed=2), some_tokens(2, 6, 2)
    predicted, sigma = normal(2, 2, 12, seed=3), torch.tensor([0.4, 1.5], dtype=torch.float64)
    found = microdit.kept_edm_loss(predicted, clean, noised, sigma, index, 2)
    # the whole image, with anything at dropped patches, and MaskDiT's loss without its second part
    filled = unpatch(restored(predicted, index, torch.full((12,), 7.0, dtype=torch.float64)), (2, 3), 2)
    denoised = maskdit.edm_preconditioned(lambda x, level: filled, noised, sigma)
    torch.testing.assert_close(found, maskdit.maskdit_loss(denoised, clean, noised, sigma, index, 2, mae_weight=0))


def test_initialisation_of_the_papers():
    fusion, model = sprint.SprintFusion(64), maskdit.MaskDiTTransformer(DIM, 1, HEADS, (4, 6), 8, decoder_width=64)
    assert fusion.bias.abs().max() == 0 and 0.01 < fusion.mask_token.std() < 0.03
    assert fusion.weight.abs().max() <= math.sqrt(6 / (64 + 128))
    x, c = torch.randn(1, N, DIM), torch.randn(1, DIM)
    assert model(x, c).abs().max() == 0  # last layer at 0
    assert isinstance(model.blocks[0].adaLN_modulation[1], nn.Linear)
    assert model.blocks[0].adaLN_modulation[1].weight.abs().max() == 0
