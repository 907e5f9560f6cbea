"""Methods that choose tiles from queries and keys, against the papers' rules, written here element by element."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from _sparse_methods import CELLS, GRID, TOKENS, Block, Model, check, masked, qkv
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import maskaccel
from maskaccel import methods as m


def expand(tiles: Tensor, bm: int, bn: int, tokens: int = TOKENS) -> Tensor:
    return tiles.repeat_interleave(bm, -2).repeat_interleave(bn, -1)[..., :tokens, :tokens]


def test_sparge_tiles() -> None:
    inputs = qkv(smooth=20, sharp=12.0)
    for t in inputs[:2]:
        t[:, :, 96:130] += 5 * torch.randn(2, 3, 34, 16, generator=torch.Generator().manual_seed(1))
    q, k, _ = (t.double() for t in inputs)
    bm, bn, cut, cdf = 32, 32, 0.3, 0.7
    blocks = [(t.unflatten(2, (-1, b))) for t, b in ((q, bm), (k, bn))]
    cosine = [F.normalize(t, dim=-1) for t in blocks]
    alike = [(t @ t.mT).mean((-1, -2)) > cut for t in cosine]
    assert 0 < sum(float(a.double().mean()) for a in alike) < 2, "the case must hold both kinds of blocks"
    s = blocks[0].mean(3) @ blocks[1].mean(3).mT / 4
    tiles = torch.zeros(s.shape, dtype=torch.bool)
    for b, h, i in itertools.product(*map(range, s.shape[:3])):
        row = s[b, h, i].masked_fill(~alike[1][b, h], -math.inf)
        p = row.softmax(0) if bool(alike[1][b, h].any()) else torch.full_like(row, 1 / len(row))
        total = 0.0
        for j in p.argsort(descending=True, stable=True).tolist():
            tiles[b, h, i, j] = True
            total += float(p[j])
            if total > cdf:
                break
        tiles[b, h, i] |= ~alike[1][b, h]
        tiles[b, h, i] |= ~alike[0][b, h, i]
    assert 0.2 < tiles.double().mean() < 0.95
    check(m.SpargeAttn(similarity=cut, cdf=cdf, block=(bm, bn)), inputs, expand(tiles, bm, bn))


def moved(cube: tuple[int, ...]) -> list[int]:
    """Raster indices in the order of cubes."""
    key = lambda c: (tuple(x // s for x, s in zip(c, cube, strict=True)), c)  # noqa: E731
    return [CELLS.index(c) for c in sorted(CELLS, key=key)]


@pytest.mark.parametrize("coarse", [0.0, 0.5])
def test_vsa_cubes(coarse) -> None:
    inputs, cube = qkv(), (2, 2, 8)
    order = torch.tensor(moved(cube))
    size, top = 32, 2
    q, k, v = (t.double()[:, :, order] for t in inputs)
    means = [t.unflatten(2, (-1, size)).mean(3) for t in (q, k, v)]
    a = (means[0] @ means[1].mT / 4).softmax(-1)
    tiles = torch.zeros(a.shape, dtype=torch.bool).scatter_(-1, a.topk(top, -1).indices, True)
    fine = masked(q, k, v, expand(tiles, size, size))
    want = fine + coarse * (a @ means[2]).repeat_interleave(size, 2)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(TOKENS))
    model = Model()
    with maskaccel.patch(model, [m.VSA(top_k=top, cube=cube, coarse=coarse, grid=GRID)]), torch.no_grad():
        got = model(*inputs)
    torch.testing.assert_close(got.double(), want[:, :, back], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("sparsity", "floor"), [(0.5, 0), (0.9, 1)])
def test_draft_percentile_of_a_head(sparsity, floor) -> None:
    inputs, patch = qkv(smooth=4), (4, 8)
    order = torch.tensor(moved((1, *patch)))
    q, k, v = (t.double()[:, :, order] for t in inputs)
    means = [t.unflatten(2, (-1, 32)).mean(3) for t in (q, k)]
    p = (means[0] @ means[1].mT / 4).softmax(-1)
    tiles = torch.zeros(p.shape, dtype=torch.bool)
    for b, h in itertools.product(range(2), range(3)):
        flat = sorted(p[b, h].flatten().tolist())
        tiles[b, h] = p[b, h] >= flat[int(sparsity * len(flat))]
    if floor:
        tiles |= p == p.amax(-1, keepdim=True)
    want = masked(q, k, v, expand(tiles, 32, 32)).nan_to_num(0.0)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(TOKENS))
    model = Model()
    method = m.DraftAttention(sparsity=sparsity, patch=patch, min_per_row=floor, grid=GRID)
    with maskaccel.patch(model, [method]), torch.no_grad():
        got = model(*inputs)
    torch.testing.assert_close(got.double(), want[:, :, back], atol=2e-5, rtol=1e-5)


def test_xattention_antidiagonals() -> None:
    inputs, stride, block, tau = qkv(smooth=10), 8, 32, 0.6
    q, k = (t.double() for t in inputs[:2])
    groups = TOKENS // stride
    s = torch.zeros(2, 3, groups, groups, dtype=torch.float64)
    scores = (q @ k.mT).unflatten(3, (groups, stride)).unflatten(2, (groups, stride)).transpose(3, 4)
    for i in range(stride):
        s += scores[..., stride - 1 - i, i]
    p = (s / (4 * stride)).softmax(-1)
    per = block // stride
    share = p.unflatten(3, (-1, per)).sum(4).unflatten(2, (-1, per)).sum(3) / per
    tiles = torch.zeros(share.shape, dtype=torch.bool)
    for b, h, i in itertools.product(*map(range, share.shape[:3])):
        total = 0.0
        for j in share[b, h, i].argsort(descending=True, stable=True).tolist():
            tiles[b, h, i, j] = True
            total += float(share[b, h, i, j])
            if total > tau:
                break
    assert 0.2 < tiles.double().mean() < 0.95
    check(m.XAttention(tau=tau, stride=stride, block=(block, block)), inputs, expand(tiles, block, block))


def test_sparse_videogen_heads() -> None:
    frames, places = GRID[0], math.prod(GRID[1:])
    generator = torch.Generator().manual_seed(0)
    q, k, v = qkv()
    # Head 0 looks at its frame, head 1 at its place, head 2 at nothing in particular.
    frame, place = torch.arange(TOKENS) // places, torch.arange(TOKENS) % places
    codes = [torch.randn(n, 16, generator=generator) for n in (frames, places)]
    q[:, 0], k[:, 0] = codes[0][frame] * 3, codes[0][frame] * 3
    q[:, 1], k[:, 1] = codes[1][place] * 3, codes[1][place] * 3
    width = 0.5
    reach = round(width * places)
    index = torch.arange(TOKENS)
    turned = place * frames + frame
    spatial = (index[:, None] - index).abs() <= reach
    temporal = (turned[:, None] - turned).abs() <= reach
    spatial, temporal = spatial | (index < places), temporal | (turned < places)
    kept = torch.stack([spatial, temporal, spatial])
    full = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    for head, (mine, other) in enumerate(((spatial, temporal), (temporal, spatial))):
        part = [masked(q, k, v, mask)[:, head] - full[:, head] for mask in (mine, other)]
        assert part[0].norm() < part[1].norm()
    model = Model()
    method = m.SparseVideoGen(width=width, samples=TOKENS, grid=GRID, block=(16, 32))
    with maskaccel.patch(model, [method]), torch.no_grad():
        got = model(q, k, v)
    want = masked(q, k, v, kept)
    torch.testing.assert_close(got[:, :2].double(), want[:, :2], atol=2e-5, rtol=1e-5)
    either = [(got[:, 2].double() - masked(q, k, v, mask)[:, 2]).abs().amax((1, 2)) for mask in (spatial, temporal)]
    assert (torch.minimum(*either) < 1e-5).all()


def test_sparse_videogen_leaves_tiles_of_both_kinds_out() -> None:
    """A sink that is scattered over the order of temporal heads would touch every tile."""
    for mask in m.SparseVideoGen(width=0.5).masks((9, 16, 16), (0, 0))[:2]:
        assert mask.density() < 0.5


def test_blocks_and_steps_share_a_graph() -> None:
    """What depends on the places of tokens is made outside of graphs, and a step that is not asked for is not seen."""
    inputs, model, counter = qkv(), Model(), CompileCounterWithBackend("eager")
    model.blocks.append(Block())
    torch._dynamo.reset()
    with maskaccel.patch(model, [m.DraftAttention(0.5, (2, 16), grid=GRID)]) as patch, torch.no_grad():
        want = model.blocks[0](*inputs)
        for block in model.blocks:
            block.compile(backend=counter)
        with patch.generation(3) as run:
            for _ in range(3):
                for block in model.blocks:
                    assert torch.equal(block(*inputs), want)
                run.step()
    assert counter.frame_count == 1
