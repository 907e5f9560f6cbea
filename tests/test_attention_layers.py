"""Layers that attend within windows, rows and sub-grids, against the papers' formulas on dense score matrices."""

from __future__ import annotations

import math

import pytest
import torch
from _attention_layers import (
    DTYPES,
    check,
    conv,
    heads_of,
    places,
    project,
    qkv_heads,
    random_parameters,
    softmax_attention,
    tokens,
)
from torch.nn import functional as F

from maskaccel import methods as m
from maskaccel.masks import GridWindow, TileMask, TokenOrder
from maskaccel.methods import _groups
from maskaccel.methods.dit3d import WINDOW_BLOCKS, join, partition
from maskaccel.methods.pt_dit import ProxyAttention, WindowAttention
from maskaccel.ops.attention import tile_attention

CPU = torch.device("cpu")


def masked_attention(p, x, heads, keep, qkv="qkv", proj="proj"):
    q, k, v = qkv_heads(p, x, heads, qkv)
    return project(p, proj, softmax_attention(q, k, v, q.shape[-1] ** -0.5, keep=keep))


# ------------------------------------------------------------------------------------------------ groups
@pytest.mark.parametrize("shift", [(0, 0), (2, 1)])
@pytest.mark.parametrize(("grid", "window"), [((8, 12), (4, 4)), ((7, 9), (4, 3)), ((5, 3), (8, 8))])
def test_groups_of_windows_are_a_grid_window(grid, window, shift):
    x = tokens(grid[0] * grid[1], 32)
    q, k, v = (x.roll(n, 1).view(2, -1, 2, 16) for n in range(3))
    rule = GridWindow(TokenOrder(grid), 0, unit=window, shift=shift)
    whole = tile_attention(q, k, v, TileMask.from_rule(rule, (x.shape[1], x.shape[1])))
    groups = _groups.windows(grid, window, shift, CPU)
    assert (groups.size is None) == any(n % w or s for n, w, s in zip(grid, window, shift) if n > w)
    moved = groups.attention(*(groups.apply(t.flatten(2)).view_as(t) for t in (q, k, v)))
    torch.testing.assert_close(groups.undo(moved.flatten(2)), whole.flatten(2))


@pytest.mark.parametrize("grid", [(6, 8), (7, 5)])
def test_sub_grids_are_a_dilated_window(grid):
    x = tokens(grid[0] * grid[1], 48)
    q, k, v = (x.roll(n, 1).view(2, -1, 2, 24) for n in range(3))
    rule = GridWindow(TokenOrder(grid), None, dilation=2)
    whole = tile_attention(q, k, v, TileMask.from_rule(rule, (x.shape[1], x.shape[1])))
    groups = _groups.sub_grids(grid, 2, CPU)
    assert (groups.size is None) == (grid == (7, 5))
    moved = groups.attention(*(groups.apply(t.flatten(2)).view_as(t) for t in (q, k, v)))
    torch.testing.assert_close(groups.undo(moved.flatten(2)), whole.flatten(2))


# ------------------------------------------------------------------------------------------------ MaskGWM
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["pointwise", "rowwise", "full"])
def test_maskgwm(kind, dtype):
    grid, heads = (3, 4, 5), 2
    at = places(*grid)
    y, x = ((at[:, None, n] == at[None, :, n]) for n in (1, 2))
    keep = {"pointwise": y & x, "rowwise": y, "full": torch.ones_like(y)}[kind]
    layer = m.MaskGWMAttention(48, heads, kind)
    check(layer, lambda p, x: masked_attention(p, x, heads, keep), [tokens(60, 48)], dtype, lambda x: layer(x, grid))


def test_maskgwm_of_rows_that_keep_equally_many_tokens():
    """Kept tokens of a row-equal mask are a smaller grid: the dense layer on it is the masked one on all."""
    grid, heads, kept = (2, 3, 6), 2, 4
    layer = m.MaskGWMAttention(32, heads)
    x = tokens(36, 32)
    chosen = torch.stack([torch.randperm(6)[:kept].sort().values for _ in range(6)])  # columns of each (frame, row)
    index = (torch.arange(6)[:, None] * 6 + chosen).flatten()
    at = places(*grid)[index]
    p = dict(layer.named_parameters())
    expected = masked_attention(p, x[:, index], heads, at[:, None, 1] == at[None, :, 1])
    torch.testing.assert_close(layer(x[:, index], (2, 3, kept)), expected)


# ------------------------------------------------------------------------------------------------ U-DiT
def udit_rotated(t, grid):
    """2-D RoPE of `(B, H, S, D)` by places of the sub-grid, adjacent channels paired, y before x."""
    quarter = t.shape[-1] // 4
    at = (places(*grid) // 2).to(t.dtype)
    frequencies = torch.tensor([10000.0 ** -(i / quarter) for i in range(quarter)]).to(t.dtype)
    angles = torch.cat([at[:, :1] * frequencies, at[:, 1:] * frequencies], dim=1)
    a, b = t[..., 0::2], t[..., 1::2]
    return torch.stack([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("grid", [(6, 8), (7, 5)])
def test_udit(grid, cosine, dtype):
    dim, heads = 48, 2
    phase = places(*grid) % 2
    keep = (phase[:, None] == phase[None]).all(-1)

    def formula(p, x):
        x = x + conv(p, "downsampler", x, grid)
        if not cosine:
            return masked_attention(p, x, heads, keep)
        q, k, v = qkv_heads(p, x, heads)
        q, k = (udit_rotated(F.normalize(t, dim=-1), grid) for t in (q, k))
        scale = p["logit_scale"].clamp(max=4.6052).exp()[:, None, None]
        return project(p, "proj", softmax_attention(q * scale, k, v, 1.0, keep=keep))

    layer = m.UDiTAttention(dim, heads, cosine=cosine)
    check(layer, formula, [tokens(grid[0] * grid[1], dim)], dtype, lambda x: layer(x, grid))


# ------------------------------------------------------------------------------------------------ PT-DiT
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grid", "window"), [((2, 6, 4), (1, 3, 2)), ((3, 5, 7), (2, 2, 4))])
def test_pt_dit_proxies(grid, window, dtype):
    dim, heads = 32, 2
    of = places(*grid) // torch.tensor(window)
    windows, which = torch.unique(of, dim=0, return_inverse=True)

    def formula(p, x):
        means = torch.stack([x[:, which == w].mean(1) for w in range(len(windows))], dim=1)
        proxies = masked_attention(p, means, heads, None, proj="proxy_proj")
        q = heads_of(project(p, "q", x), heads)
        k, v = (heads_of(t, heads) for t in project(p, "kv", proxies).chunk(2, -1))
        return project(p, "proj", softmax_attention(q, k, v, 16**-0.5))

    layer = ProxyAttention(dim, heads, window)
    # large: from scores near 0 all proxies are one, and gradients of q what rounding leaves
    check(layer, formula, [4 * tokens(math.prod(grid), dim)], dtype, lambda x: layer(x, grid))


@pytest.mark.parametrize(("grid", "window"), [((2, 6, 4), (1, 3, 2)), ((3, 5, 7), (2, 2, 4))])
def test_pt_dit_random_proxies(grid, window):
    """One token of each window, windows in raster order; every token has its turn."""
    x = torch.arange(math.prod(grid)).float()[None, :, None].expand(2, -1, 16)
    of = places(*grid) // torch.tensor(window)
    windows, which = torch.unique(of, dim=0, return_inverse=True)
    layer = ProxyAttention(16, 1, window, "random")
    torch.manual_seed(0)
    drawn = torch.stack([layer.proxies(x, grid)[0, :, 0].long() for _ in range(200)])
    assert torch.equal(which[drawn], torch.arange(len(windows)).expand(200, -1))
    assert set(drawn.flatten().tolist()) == set(range(math.prod(grid)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [None, (1, 1, 2)])
def test_pt_dit_windows(shift, dtype):
    grid, window, dim, heads = (3, 5, 7), (2, 2, 4), 32, 2
    of = (places(*grid) + torch.tensor(shift or (0, 0, 0))) // torch.tensor(window)
    keep = (of[:, None] == of[None]).all(-1)
    layer = WindowAttention(dim, heads, window, shift)
    check(layer, lambda p, x: masked_attention(p, x, heads, keep), [tokens(105, dim)], dtype, lambda x: layer(x, grid))


def test_pt_dit_adds_the_three_attentions_one_after_the_other():
    layer, grid, x = m.PTDiTAttention(32, 2, (1, 2, 2), (1, 4, 4)), (2, 4, 8), tokens(64, 32)
    random_parameters(layer)
    assert layer.shifted_window.shift == (0, 2, 2)
    expected = x
    for part in (layer.proxy, layer.window, layer.shifted_window):
        expected = expected + part(F.layer_norm(expected, (32,), eps=1e-6), grid)
    torch.testing.assert_close(layer(x, grid), expected)


# ------------------------------------------------------------------------------------------------ DiT-3D
def decomposed_bias(p, q, window):
    """q `(B, H, n, D)` of a window: the bias element by element."""
    at = places(*window)
    bias = 0.0
    for axis, name in enumerate("xyz"):
        offset = at[:, None, axis] - at[None, :, axis] + window[axis] - 1
        bias = bias + (q[:, :, :, None] * p[f"relative_position.{name}"][offset]).sum(-1)
    return bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relative_position", [False, True])
@pytest.mark.parametrize(("grid", "pad"), [((4, 4, 6), "exact"), ((3, 5, 4), "exact"), ((3, 5, 4), "zeros")])
def test_dit3d_windows(grid, pad, relative_position, dtype):
    dim, heads, window = 48, 2, (2, 2, 3)
    layer = m.DiT3DAttention(dim, heads, grid, window, relative_position=relative_position, pad=pad)

    def formula(p, x):
        """Window by window."""
        volume = x.unflatten(1, grid)
        out = torch.zeros_like(volume)
        for corner in places(*(-(-n // w) for n, w in zip(grid, window))).tolist():
            part = tuple(slice(c * w, c * w + w) for c, w in zip(corner, window))
            inside = volume[(slice(None), *part)]
            have = inside.shape[1:4]
            missing = [w - n for w, n in zip(window, have)]
            padded = F.pad(inside, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0]))
            q, k, v = qkv_heads(p, padded.flatten(1, 3), heads)
            keep = (places(*window) < torch.tensor(have)).all(-1).expand(len(places(*window)), -1)
            bias = decomposed_bias(p, q, window) if relative_position else 0.0
            done = softmax_attention(q, k, v, 24**-0.5, bias=bias, keep=None if pad == "zeros" else keep)
            done = project(p, "proj", done).unflatten(1, window)[:, : have[0], : have[1], : have[2]]
            out = out.index_put((slice_index(2), *(slice_index(s, n) for s, n in zip(part, grid))), done)
        return out.flatten(1, 3)

    def slice_index(part, size=None):
        axes = 4
        at = torch.arange(part) if size is None else torch.arange(size)[part]
        where = 0 if size is None else slice_index.axis
        slice_index.axis = 1 if size is None else where % 3 + 1
        return at.view([-1 if n == where else 1 for n in range(axes)])

    slice_index.axis = 1
    check(layer, formula, [tokens(math.prod(grid), dim)], dtype)


def test_dit3d_global_attention():
    grid, heads = (2, 3, 2), 2
    layer = m.DiT3DAttention(32, heads, grid, None, relative_position=True)

    def formula(p, x):
        q, k, v = qkv_heads(p, x, heads)
        return project(p, "proj", softmax_attention(q, k, v, 0.25, bias=decomposed_bias(p, q, grid)))

    check(layer, formula, [tokens(12, 32)], torch.float32)
    assert WINDOW_BLOCKS == (0, 3, 6, 9)


@pytest.mark.parametrize("grid", [(4, 6, 8), (5, 3, 7)])
def test_dit3d_partition_and_join(grid):
    x = tokens(math.prod(grid), 3)
    windows = partition(x, grid, (2, 4, 3))
    assert windows.shape[1] == 24
    assert torch.equal(windows[0, 0], x[0, 0])
    assert torch.equal(join(windows, grid, (2, 4, 3)), x)


# ------------------------------------------------------------------------------------------------ HDiT
def hdit_formula(grid, heads, kernel):
    """Per token and head; the authors' order of channels is permuted to ours: q and k alone, so no result changes."""
    at = places(*grid)
    keep = torch.ones(len(at), len(at), dtype=torch.bool)
    if kernel is not None:
        reach = torch.tensor([kernel // 2] * 2)
        centre = torch.minimum(at.clamp(min=reach), torch.maximum(torch.tensor(grid) - 1 - reach, reach))
        keep = ((centre[:, None] - at[None]).abs() <= reach).all(-1)

    def rotated(t):
        dim = t.shape[-1]
        pos = ((at * 2 + 1 - torch.tensor(grid)) / max(grid)).to(t.dtype)
        freqs = torch.linspace(math.log(math.pi), math.log(10 * math.pi), heads * dim // 8 + 1)[:-1].exp()
        freqs = freqs.view(dim // 8, heads).T.to(t.dtype)
        theta = torch.cat([pos[:, :1, None] * freqs.T, pos[:, 1:, None] * freqs.T], 1)  # (S, dim / 4, heads)
        theta = theta.permute(2, 0, 1)
        d = dim // 4
        x1, x3, x2, x4 = t.split(d, dim=-1)
        return torch.cat([x1 * theta.cos() - x2 * theta.sin(), x2 * theta.cos() + x1 * theta.sin(), x3, x4], -1)

    def formula(p, x):
        q, k, v = qkv_heads(p, x, heads)
        root = p["scale"].sqrt()[:, None, None]
        q, k = (rotated(t * (root * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt())) for t in (q, k))
        return project(p, "proj", softmax_attention(q, k, v, 1.0, keep=keep))

    return formula


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grid", "kernel"), [((9, 12), 3), ((5, 17), 7), ((6, 4), None)])
def test_hdit(grid, kernel, dtype):
    layer = m.HDiTAttention(64, 2, kernel)
    check(layer, hdit_formula(grid, 2, kernel), [tokens(math.prod(grid), 64)], dtype, lambda x: layer(x, grid))
