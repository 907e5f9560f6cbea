"""MDT: the span on kept tokens, the side block at dropped ones, ratios and guidance, against the paper's equations."""

from __future__ import annotations

import math

import pytest
import torch
from _train_methods import adaln_block, assert_same, double, normal, of, restored, some_tokens

from maskaccel.masks import TokenIndex
from maskaccel.methods import mdt
from maskaccel.methods._masked_rows import partial_block
from maskaccel.methods._ratios import RatioRange
from maskaccel.methods._transformer import AdaLNBlock

GRID, DIM, HEADS = (4, 6), 24, 2
N = 24


def index_of(batch, keep):
    return some_tokens(batch, N, keep)


def bias_of(table, at):
    """The paper's table at all pairs of tokens, `(heads, N, N)`."""
    y, x = at // GRID[1], at % GRID[1]
    dy, dx = y[:, None] - y[None] + GRID[0] - 1, x[:, None] - x[None] + GRID[1] - 1
    return table[:, dy * (2 * GRID[1] - 1) + dx]


def plain_block(p, x, c, ids=None, skip=None):
    """The block of the authors, the bias of all pairs gathered at kept tokens."""
    bias = 0.0
    if "attn.relative_position" in p:
        ids = torch.arange(N).expand(len(x), N) if ids is None else ids.expand(len(x), -1)
        bias = torch.stack([bias_of(p["attn.relative_position"], at.long()) for at in ids])
    return adaln_block(p, x, c, HEADS, bias, skip)


def plain_side(p, x, c, index):
    """Restore, positions, the whole side block, and its result at masked tokens alone."""
    mask = ~index.mask
    full = restored(x, index, p["mask_token"]) + p["decoder_pos_embed"]
    side = plain_block(of(p, "block"), full, c)
    return torch.where(mask[..., None], side, full)


def test_side_interpolater_is_the_whole_side_block():
    side = double(mdt.SideInterpolater(DIM, GRID, HEADS, 2.0))
    x, c, index = normal(3, 15, DIM).requires_grad_(), normal(3, DIM, seed=2).requires_grad_(), index_of(3, 15)
    p = dict(side.named_parameters())
    gradients = assert_same(side(x, c, index), plain_side(p, x, c, index), [x, c, *p.values()])
    assert all(g is not None and g.abs().max() > 0 for g in gradients)


def test_dense_pass_adds_positions_and_touches_every_parameter():
    side = double(mdt.SideInterpolater(DIM, GRID, HEADS, 2.0))
    x = normal(2, N, DIM)
    for index in (None, TokenIndex.all(N)):
        out = side(x, normal(2, DIM), index)
        torch.testing.assert_close(out, x + side.decoder_pos_embed)
    out.sum().backward()
    untouched = [name for name, p in side.named_parameters() if p.grad is None]
    assert untouched == []
    assert side.mask_token.grad.abs().max() == 0


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_the_whole_stack(version, masked):
    model = double(mdt.MDTTransformer(DIM, 6, HEADS, GRID, version=version, decode_layer=2, mlp_ratio=2.0))
    x, c = normal(2, N, DIM).requires_grad_(), normal(2, DIM, seed=2)
    index = index_of(2, 14) if masked else None
    p = dict(model.named_parameters())

    def formula():
        h = whole = x + p["pos_embed"]
        ids = None
        if masked:
            ids = index.keep
            h = h.gather(1, ids.long()[..., None].expand(-1, -1, DIM))
        skips = []
        for i in range(len(model.en_inblocks)):
            h = plain_block(of(p, f"en_inblocks.{i}"), h, c, ids)
            skips.append(h)
        for i in range(len(model.en_outblocks)):
            h = plain_block(of(p, f"en_outblocks.{i}"), h, c, ids, skips.pop())
        h = plain_side(of(p, "side"), h, c, index) if masked else h + p["side.decoder_pos_embed"]
        for i in range(2):
            h = plain_block(of(p, f"de_blocks.{i}"), h, c, None, whole if version == 2 else None)
        return h

    assert (len(model.en_inblocks), len(model.en_outblocks)) == ((4, 0) if version == 1 else (2, 2))
    assert_same(model(x, c, index), formula(), [x, *p.values()])


def test_two_passes_then_one_backward():
    model = double(mdt.MDTTransformer(DIM, 4, HEADS, GRID, decode_layer=2, mlp_ratio=2.0))
    x, c, index = normal(2, N, DIM), normal(2, DIM, seed=2), index_of(2, 14)
    (model(x, c).square().mean() + model(x, c, index).square().mean()).backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(x, c).square().mean().backward()
    model(x, c, index).square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(together[name], p.grad, msg=name)


def test_ratio_is_of_the_host_and_in_buckets():
    ratio = RatioRange(0.3, 0.5, bucket=16)
    found = [ratio.kept(256, step) for step in range(300)]
    assert set(found) == set(ratio.all_kept(256)) == {128, 144, 160, 176}
    assert all(isinstance(k, int) for k in found)
    assert abs(sum(ratio.ratio(step) for step in range(300)) / 300 - 0.4) < 0.01
    assert found == [RatioRange(0.3, 0.5, bucket=16).kept(256, step) for step in range(300)]
    assert RatioRange(0.3, 0.5, seed=1).ratio(0) != ratio.ratio(0)
    assert [RatioRange(0.25, 0.25, 1).kept(256, s) for s in (0, 1)] == [192, 192]
    for bad in ({"low": 0.6}, {"high": 1.0}, {"bucket": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            RatioRange(**bad)


def test_choose_follows_step_and_seed():
    model = mdt.MDTTransformer(DIM, 4, HEADS, (16, 16), decode_layer=2)
    a, b = model.choose(4, 3), model.choose(4, 3)
    assert torch.equal(a.keep, b.keep) and a.kept == model.ratio.kept(256, 3) and a.n == 256
    assert not torch.equal(a.keep, model.choose(4, 3, seed=1).keep)
    assert torch.equal(model.choose(2, 3, offset=2).keep, a.keep[2:])


def test_power_cosine_scale():
    t = torch.tensor([0.0, 250.0, 1000.0])
    want = [1 + 2.8 * (1 - math.cos(math.pi * (1 - v / 1000) ** 4)) / 2 for v in t.tolist()]
    torch.testing.assert_close(mdt.power_cosine_scale(3.8, t), torch.tensor(want))
    assert mdt.power_cosine_scale(3.8, 1000) == 1 and mdt.power_cosine_scale(3.8, 0) == pytest.approx(3.8)


def test_bad_settings():
    with pytest.raises(ValueError, match="version=3"):
        mdt.MDTTransformer(DIM, 4, HEADS, GRID, version=3)
    with pytest.raises(ValueError, match="depth=4, decode_layer=4"):
        mdt.MDTTransformer(DIM, 4, HEADS, GRID)
    with pytest.raises(ValueError, match="skip and context"):
        AdaLNBlock(DIM, HEADS)(torch.zeros(1, 2, DIM), torch.zeros(1, DIM), skip=torch.zeros(1, 2, DIM))


# ------------------------------------------------------------------------------------------------ other blocks
def test_partial_block_of_diffusers():
    attention = pytest.importorskip("diffusers.models.attention")
    common = {"dim": DIM, "num_attention_heads": HEADS, "attention_head_dim": DIM // HEADS}
    zero = attention.BasicTransformerBlock(
        **common, norm_type="ada_norm_zero", num_embeds_ada_norm=10, activation_fn="gelu-approximate"
    )
    single = attention.BasicTransformerBlock(
        **common, norm_type="ada_norm_single", cross_attention_dim=16, activation_fn="gelu-approximate"
    )
    x, index = normal(2, N, DIM).requires_grad_(), index_of(2, 9)
    given = {"timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])}
    cross = {"timestep": normal(2, 6 * DIM), "encoder_hidden_states": normal(2, 5, 16)}
    for block, kwargs in ((zero, given), (single, cross)):
        block = double(block).eval()
        leaves = [x, *block.parameters()]
        assert_same(partial_block(block, x, index, **kwargs), index.gather(block(x, **kwargs)), leaves)
    with pytest.raises(TypeError, match="block is a Linear"):
        partial_block(torch.nn.Linear(2, 2), x, index)


@pytest.mark.parametrize("last", [False, True])
def test_partial_block_of_sd3(last):
    attention = pytest.importorskip("diffusers.models.attention")
    block = attention.JointTransformerBlock(DIM, HEADS, DIM // HEADS, context_pre_only=last, qk_norm="rms_norm")
    block = double(block).eval()
    x, index = normal(2, N, DIM).requires_grad_(), index_of(2, 9)
    given = {"encoder_hidden_states": normal(2, 5, DIM, seed=2).requires_grad_(), "temb": normal(2, DIM, seed=3)}
    leaves = [x, given["encoder_hidden_states"], *block.parameters()]
    want = index.gather(block(x, **given)[1])
    assert_same(partial_block(block, x, index, **given), want, leaves)
    block.use_dual_attention = True
    with pytest.raises(TypeError, match="dual attention"):
        partial_block(block, x, index, **given)


def test_partial_block_of_the_original_code():
    block = double(_OriginalBlock())
    x, c, index = normal(2, N, DIM).requires_grad_(), normal(2, DIM), index_of(2, 9)
    want = index.gather(plain_block(dict(block.named_parameters()), x, c))
    assert_same(partial_block(block, x, index, c), want, [x, *block.parameters()])
    # a layer that is not a plain linear one is called as a whole
    calls = []
    block.attn.qkv.register_forward_hook(lambda *a: calls.append(a[1][0].shape))
    torch.testing.assert_close(partial_block(block, x, index, c), want)
    assert [shape[1] for shape in calls] == [9, N]


class _OriginalBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        block = AdaLNBlock(DIM, HEADS, 2.0)
        self.norm1, self.norm2 = (torch.nn.LayerNorm(DIM, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.mlp, self.adaLN_modulation = block.mlp, block.adaLN_modulation
        self.attn = torch.nn.Module()
        self.attn.qkv, self.attn.proj, self.attn.num_heads = block.attn.qkv, block.attn.proj, HEADS
        self.attn.q_norm = torch.nn.Identity()
