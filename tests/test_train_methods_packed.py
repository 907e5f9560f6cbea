"""Samples that keep different numbers of tokens: FiT, D2iT and FastDiT-3D."""

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
)
from torch.nn import functional as F

from maskaccel.masks import TokenIndex
from maskaccel.methods import d2it, fastdit3d, fit
from maskaccel.methods._transformer import AdaLNBlock, sincos

DIM, HEADS = 16, 2


# ------------------------------------------------------------------------------------------------------ FiT
def padded_block(p, x, c, valid, angles, common=None):
    """The authors' form: padded tokens attend among themselves only, and are set to 0 after attention."""
    mods = linear(p, "adaLN_modulation.2" if common is not None else "adaLN_modulation.1",
                  linear(p, "adaLN_modulation.1", F.silu(c)) if common is not None else F.silu(c))  # fmt: skip
    mods = (mods if common is None else mods + common)[:, None].chunk(6, -1)
    y = F.layer_norm(x, (DIM,), eps=1e-6) * (1 + mods[1]) + mods[0]
    q, k, v = (heads(t, HEADS) for t in linear(p, "attn.qkv", y).chunk(3, -1))
    if common is not None:
        q, k = (F.layer_norm(t, t.shape[-1:], p[f"attn.{name}_norm"], None, 1e-6) for t, name in ((q, "q"), (k, "k")))

    def turn(t):
        pair = torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pair * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)

    same = valid[:, None, :, None] == valid[:, None, None, :]
    a = attention(turn(q), turn(k), v, torch.zeros(()).masked_fill(~same, -math.inf).double())
    x = x + mods[2] * linear(p, "attn.proj", a * valid[..., None])
    y = F.layer_norm(x, (DIM,), eps=1e-6) * (1 + mods[4]) + mods[3]
    value, gate = linear(p, "w12", y).chunk(2, -1)
    value, gate = gate, value  # the gate comes first
    return x + mods[5] * linear(p, "w3", F.silu(gate) * value)


@pytest.mark.parametrize("version", [1, 2])
def test_packed_is_padded(version):
    grids = ((2, 5), (3, 3), (1, 7))
    model = double(fit.FiTBlocks(DIM, 2, HEADS, version=version, rank=6))
    packing, p = fit.Packing(grids), dict(model.named_parameters())
    images = [normal(h * w, DIM, seed=i).requires_grad_() for i, (h, w) in enumerate(grids)]
    c = normal(3, DIM, seed=7)
    frequency = 10000.0 ** (-torch.arange(0, 4, 2).double() / 4)  # of heads of 8 channels
    x, valid, angles = (
        torch.zeros(3, 12, DIM).double(),
        torch.zeros(3, 12, dtype=torch.bool),
        torch.zeros(3, 12, 4).double(),
    )
    for i, (h, w) in enumerate(grids):
        valid[i, : h * w] = True
        place = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2).double()
        angles[i, : h * w] = (place[:, :, None] * frequency).flatten(1)
    x = torch.stack([F.pad(image, (0, 0, 0, 12 - len(image))) for image in images])
    common = None if version == 1 else linear(p, "global_modulation.1", F.silu(c))
    for i in range(2):
        x = padded_block(of(p, f"blocks.{i}"), x, c, valid, angles, common)
    out = model(packing.pack(images), c, packing)
    assert out.shape == (1, 26, DIM)
    want = torch.cat([x[i, : len(image)] for i, image in enumerate(images)])[None]
    assert_same(out, want, [*images, *p.values()], 1e-6)  # rotations are formed in fp32
    # the loss: padded errors times N / valid, and the mean over an image's own tokens
    errors = F.pad(x.square().mean(-1), (0, 4)) * F.pad(valid, (0, 4))
    torch.testing.assert_close(
        packing.mean(out.square().mean(-1)), errors.mean(1) * 16 / valid.sum(1), rtol=1e-6, atol=1e-6
    )


def test_packing():
    packing = fit.Packing(((2, 3), (1, 4)))
    assert packing.lengths == (6, 4) and packing.offsets == (0, 6, 10)
    assert packing.samples().tolist() == [0] * 6 + [1] * 4
    mask = packing.mask().to_bool()[0, 0]
    same = packing.samples()[:, None] == packing.samples()
    assert torch.equal(mask, same) and fit.Packing(((2, 3),)).mask() is None
    samples = [normal(6, 3), normal(4, 3, seed=2)]
    assert all(torch.equal(a, b) for a, b in zip(packing.unpack(packing.pack(samples)), samples, strict=True))
    for grids, message in ((((0, 3),), "grids"), ((), "grids")):
        with pytest.raises(ValueError, match=message):
            fit.Packing(grids)
    with pytest.raises(ValueError, match=r"lengths \(4, 6\)"):
        packing.pack(samples[::-1])
    with pytest.raises(ValueError, match="width=6"):
        packing.rope(6)


# ------------------------------------------------------------------------------------------------------ D2iT
def test_grains():
    fine = torch.tensor([[[True, False], [False, True]], [[False, False], [False, True]]])
    grains = d2it.Grains.of(fine)
    assert grains.counts == (10, 7) and grains.tokens == 17
    assert grains.samples().tolist() == [0] * 10 + [1] * 7
    cells = normal(2, 16, 3).requires_grad_()
    want, grid = [], cells.view(2, 4, 4, 3)
    for b in range(2):
        for y in range(2):
            for x in range(2):
                region = grid[b, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(4, 3)
                want += list(region) if fine[b, y, x] else [region.mean(0)]
    assert_same(grains.pack(cells), torch.stack(want)[None], [cells])
    back = grains.unpack(grains.pack(cells)).view(2, 4, 4, 3)
    region = fine.repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(back[region], grid[region])
    means = grid.unflatten(1, (2, 2)).unflatten(3, (2, 2)).mean((2, 4))
    torch.testing.assert_close(back[~region], means.repeat_interleave(2, 1).repeat_interleave(2, 2)[~region])
    same = grains.samples()[:, None] == grains.samples()
    assert torch.equal(grains.mask().to_bool()[0, 0], same)
    with pytest.raises(ValueError, match="fine is torch"):
        d2it.Grains.of(fine.float())


def test_two_grains_in_blocks_are_each_image_by_itself():
    grains = d2it.Grains.of(torch.tensor([[[True, False]], [[False, False]]]))
    block, cells, c = double(AdaLNBlock(DIM, HEADS, 2.0)), normal(2, 8, DIM), normal(2, DIM, seed=2)
    out = block(grains.pack(cells), c, samples=grains.samples(), mask=grains.mask())[0].split(grains.counts)
    for i, tokens in enumerate(grains.pack(cells)[0].split(grains.counts)):
        want = adaln_block(dict(block.named_parameters()), tokens[None], c[i : i + 1], HEADS)
        torch.testing.assert_close(out[i], want[0])


def test_fine_regions_hold_the_most_information():
    image = torch.zeros(1, 3, 8, 8)
    image[:, :, :4, 4:] = torch.linspace(-1, 1, 16).view(4, 4)
    scores = d2it.entropy(image, 4)
    assert scores.shape == (1, 2, 2) and scores.argmax() == 1
    assert scores[0, 0, 1] > 2 and scores[0, 1, 1] < math.log(2) + 0.01  # flat: at most two neighbouring bins
    assert d2it.fine_regions(scores, 0.25).tolist() == [[[False, True], [False, False]]]
    assert d2it.fine_regions(normal(3, 4, 4), 0.4).sum((1, 2)).tolist() == [6, 6, 6]
    with pytest.raises(ValueError, match="part=2"):
        d2it.fine_regions(scores, 2)


# ------------------------------------------------------------------------------------------------------ FastDiT-3D
def test_voxel_aware_counts():
    masks = fastdit3d.VoxelAware(0.9, 0.5)
    voxels = torch.zeros(3, 8, 8, 8)
    for b, side in enumerate((1, 4, 0)):
        voxels[b, :side, :side, :side] = 1.0
    occupied = masks.occupied(voxels, 2)
    assert occupied.sum(1).tolist() == [1, 8, 0]
    index = masks.choose(occupied, masks.capacity(64, 0.125), seed=0, step=3)
    want = [(1, round(63 * 0.1)), (4, round(56 * 0.1)), (0, round(64 * 0.1))]
    found = [(int((m & o).sum()), int((m & ~o).sum())) for m, o in zip(index.mask, occupied, strict=True)]
    assert found == want and index.counts.tolist() == [a + b for a, b in want]
    assert index.kept == masks.capacity(64, 0.125) >= max(a + b for a, b in want)
    again = masks.choose(occupied, index.kept, seed=0, step=3)
    assert torch.equal(index.keep, again.keep)
    assert not torch.equal(index.keep, masks.choose(occupied, index.kept, seed=0, step=4).keep)
    assert fastdit3d.VoxelAware().background == 0.99 and fastdit3d.VoxelAware().foreground == 0.95
    with pytest.raises(ValueError, match="foreground=1"):
        fastdit3d.VoxelAware(0.5, 1.0)
    with pytest.raises(ValueError, match="patch=3"):
        masks.occupied(voxels, 3)


def test_decoder_with_windows_over_restored_tokens():
    grid = (4, 4, 4)
    decoder = double(fastdit3d.FastDiT3DDecoder(DIM, grid, 8, width=12, depth=2, heads=2, window=2, windowed=(1,)))
    mask = torch.rand(2, 64, generator=torch.Generator().manual_seed(0)) < 0.2
    index = TokenIndex.from_mask(mask, capacity=int(mask.sum(1).max()))
    x, c, p = normal(2, index.kept, DIM).requires_grad_(), normal(2, DIM, seed=2), dict(decoder.named_parameters())
    h = adaln_linear(of(p, "decoder_layer"), x, c)
    full = []
    for b in range(2):
        count = int(index.counts[b])
        one = TokenIndex.from_keep(index.keep[b : b + 1, :count], 64)
        full.append(restored(h[b : b + 1, :count], one, p["mask_token"]))
    h = torch.cat(full) + sincos(grid, 12).double()
    h = adaln_block(of(p, "decoder_blocks.0"), h, c, 2)
    place = torch.cartesian_prod(*(torch.arange(4) // 2 for _ in range(3)))
    window = (place[:, None] == place).all(-1)
    bias = torch.zeros(64, 64).masked_fill(~window, -math.inf).double()
    h = adaln_linear(of(p, "final_layer"), adaln_block(of(p, "decoder_blocks.1"), h, c, 2, bias), c)
    assert_same(decoder(x, c, index), h, [x, *p.values()])


def test_ragged_encoder_is_each_sample_by_itself():
    grid = (4, 4, 4)
    decoder = fastdit3d.FastDiT3DDecoder(24, grid, 8, width=12, depth=1, heads=2, windowed=())
    model = double(fastdit3d.FastDiT3DTransformer(24, 2, HEADS, grid, 8, mlp_ratio=2.0, decoder=decoder))
    p = dict(model.named_parameters())
    mask = torch.rand(2, 64, generator=torch.Generator().manual_seed(0)) < torch.tensor([[0.1], [0.3]])
    index = TokenIndex.from_mask(mask, capacity=int(mask.sum(1).max()))
    x, c = normal(2, 64, 24).requires_grad_(), normal(2, 24, seed=2)
    rows = []
    for b in range(2):
        h = (x[b : b + 1] + sincos(grid, 24).double())[:, mask[b]]
        for i in range(2):
            h = adaln_block(of(p, f"blocks.{i}"), h, c[b : b + 1], HEADS)
        rows.append(F.pad(h, (0, 0, 0, index.kept - h.shape[1])))
    assert index.counts[0] < index.counts[1]
    assert_same(model(x, c, index), model.decoder(torch.cat(rows), c, index), [x, *p.values()])
    assert_same(model(x, c), model(x, c, TokenIndex.all(64)))
