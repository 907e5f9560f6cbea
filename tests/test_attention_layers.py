"""Self-attention layers of papers against the papers' formulas on dense score matrices."""

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
)
from torch import nn
from torch.nn import functional as F

from maskaccel import methods as m
from maskaccel.masks import GridWindow, TileMask, TokenOrder
from maskaccel.methods import _groups
from maskaccel.methods.dit3d import WINDOW_BLOCKS, join, partition
from maskaccel.methods.pt_dit import ProxyAttention, WindowAttention
from maskaccel.ops.attention import tile_attention

CPU = torch.device("cpu")


def tokens(count, dim, seed=1):
    return torch.randn(2, count, dim, generator=torch.Generator().manual_seed(seed))


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


# ------------------------------------------------------------------------------------------------ mediators
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grid", "mediators"), [((9, 7), 4), ((6, 10), 16)])
def test_mediators(grid, mediators, dtype):
    dim, heads, count = 48, 2, math.prod(grid)

    def bias(p, of):
        terms = {name: p[f"bias_of_{of}.{name}"] for name in ("map", "rows", "columns")}
        resized = F.interpolate(terms["map"], size=grid, mode="bilinear").reshape(1, heads, mediators, count)
        axial = (terms["rows"] + terms["columns"]).reshape(1, heads, mediators, count)
        return resized + axial

    def formula(p, x):
        q, k, v = project(p, "qkv", x).chunk(3, -1)
        side = math.isqrt(mediators)
        pooled = F.adaptive_avg_pool2d(q.transpose(1, 2).reshape(2, dim, *grid), (side, side))
        pooled = heads_of(pooled.flatten(2).transpose(1, 2), heads)
        q, k, wide = (heads_of(t, heads) for t in (q, k, v))
        gathered = heads_of(softmax_attention(pooled, k, wide, 24**-0.5, bias=bias(p, "mediators")), heads)
        out = softmax_attention(q, pooled, gathered, 24**-0.5, bias=bias(p, "tokens").mT)
        return project(p, "proj", out + conv(p, "dwc", v, grid))

    check(m.MediatorAttention(dim, heads, grid, mediators), formula, [tokens(count, dim)], dtype)


def test_the_schedule_of_mediators():
    schedule = m.MediatorSchedule(3, (0.5, 0.25), first=2)
    for _ in range(2):
        latent, chosen = torch.zeros(2, 3), []
        for change in (0, 4, -4, 3, -1.9, 0.5, 0.1, 9):
            latent = latent + change
            chosen.append(schedule.update(latent))
        # changes are compared with 4: 3 is above half, 1.9 below it, 0.5 below a quarter
        assert chosen == [0, 0, 0, 0, 1, 2, 2, 2]
        schedule.reset()
    for bad in ((0, (), 1), (3, (0.5,), 1), (2, (0.5,), 0), (3, (0.2, 0.5), 1)):
        with pytest.raises(ValueError):
            m.MediatorSchedule(*bad)


# ------------------------------------------------------------------------------------------------ DiffiT
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relative_position", [False, True])
def test_diffit(relative_position, dtype):
    grid, dim, heads = (5, 7), 48, 2
    at = places(*grid)
    dy, dx = (at[:, None] - at[None]).unbind(-1)

    def formula(p, x, t):
        q, k, v = (
            heads_of(a + b[:, None], heads)
            for a, b in zip(project(p, "qkv", x).chunk(3, -1), project(p, "qkv_time", t).chunk(3, -1))
        )
        bias = p["relative_position"].view(heads, 9, 13)[:, dy + 4, dx + 6] if relative_position else 0.0
        return project(p, "proj", softmax_attention(q, k, v, 24**-0.5, bias=bias))

    layer = m.DiffiTAttention(dim, heads, grid, 20, relative_position=relative_position)
    check(layer, formula, [tokens(35, dim), tokens(1, 20)[:, 0]], dtype)


# ------------------------------------------------------------------------------------------------ linear attention
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [2, 3])
def test_lit(heads, dtype):
    grid, dim = (7, 9), 48

    def formula(p, x):
        q, k, v = project(p, "qkv", x).chunk(3, -1)
        wide_q, wide_k, wide_v = (heads_of(t, heads) for t in (q.relu(), k.relu(), v))
        weights = wide_q @ wide_k.mT
        out = (weights @ wide_v / (weights.sum(-1, keepdim=True) + 1e-6)).transpose(1, 2).flatten(2)
        return project(p, "proj", out + conv(p, "dwc", v, grid))

    layer = m.LiTAttention(dim, heads)
    check(layer, formula, [tokens(63, dim)], dtype, lambda x: layer(x, grid))


def test_lit_takes_heads_that_are_too_wide_for_kernels():
    layer = m.LiTAttention(576, 2)
    assert layer.backend == "reference"
    assert layer(tokens(6, 576), (2, 3)).shape == (2, 6, 576)


def dit_attention(dim, bias=True):
    attention = nn.Module()
    attention.qkv, attention.proj = nn.Linear(dim, 3 * dim, bias), nn.Linear(dim, dim)
    return attention


def test_lit_in_place_of_the_attention_of_a_dit():
    attention = dit_attention(48, bias=False).double()
    new = m.LiTAttention.from_attention(attention, 3)
    assert new.heads == 3 and new.qkv.bias is None and new.qkv.weight.dtype == torch.float64
    assert not torch.equal(new.qkv.weight, attention.qkv.weight)
    kept = m.LiTAttention.from_attention(attention, projections=True)
    assert torch.equal(kept.qkv.weight, attention.qkv.weight) and torch.equal(kept.proj.bias, attention.proj.bias)
    with pytest.raises(TypeError, match="qkv and proj"):
        m.LiTAttention.from_attention(nn.Linear(3, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linfusion(dtype):
    dim, heads = 48, 2

    def branch(p, name, x):
        x = F.layer_norm(project(p, f"{name}.0", x), (dim // 4,), p[f"{name}.1.weight"], p[f"{name}.1.bias"])
        return project(p, f"{name}.3", F.leaky_relu(x, 0.01))

    def formula(p, x):
        q, k = (heads_of(F.elu(project(p, f"to_{n}", x + branch(p, f"f_{n}", x))) + 1, heads) for n in ("q", "k"))
        v = heads_of(project(p, "to_v", x), heads)
        z = (q * k.mean(-2, keepdim=True)).sum(-1, keepdim=True) + 1e-4
        return project(p, "to_out", (q @ (k.mT @ v / x.shape[1]) / z).transpose(1, 2).flatten(2))

    check(m.LinFusionAttention(dim, heads), formula, [tokens(61, dim)], dtype)


def test_linfusion_in_place_of_a_diffusers_attention():
    attention_of = pytest.importorskip("diffusers.models.attention_processor").Attention
    attention = attention_of(48, heads=3, dim_head=16, bias=False)
    layer, x = m.LinFusionAttention.from_attention(attention), tokens(20, 48)
    q, k, v = (heads_of(getattr(attention, f"to_{n}")(x), 3) for n in "qkv")
    q, k = F.elu(q) + 1, F.elu(k) + 1  # the branches start at 0
    out = q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT + 1e-4 * 20)
    torch.testing.assert_close(layer(x), attention.to_out[0](out.transpose(1, 2).flatten(2)))
    with pytest.raises(TypeError, match="of one width"):
        m.LinFusionAttention.from_attention(attention_of(48, cross_attention_dim=32, heads=3, dim_head=16))


# ------------------------------------------------------------------------------------------------ all of them
LAYERS = {
    "DiT3DAttention": (lambda: m.DiT3DAttention(32, 2, (3, 4, 4), 2), ()),
    "DiffiTAttention": (lambda: m.DiffiTAttention(32, 2, (6, 8)), "time"),
    "HDiTAttention": (lambda: m.HDiTAttention(32, 2, 3), ((6, 8),)),
    "LiTAttention": (lambda: m.LiTAttention(32), ((6, 8),)),
    "LinFusionAttention": (lambda: m.LinFusionAttention(32, 2), ()),
    "MaskGWMAttention": (lambda: m.MaskGWMAttention(32, 2), ((2, 4, 6),)),
    "MediatorAttention": (lambda: m.MediatorAttention(32, 2, (6, 8)), ()),
    "PTDiTAttention": (lambda: m.PTDiTAttention(32, 2, (1, 2, 4)), ((2, 4, 6),)),
    "UDiTAttention": (lambda: m.UDiTAttention(32, 2, cosine=True), ((5, 7),)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_training_after_sampling(name):
    """What is remembered in inference mode can be used in training; weights learn."""
    make, extra = LAYERS[name]
    layer = make()
    extra = (tokens(1, 32)[:, 0],) if extra == "time" else extra
    x = tokens(35 if name == "UDiTAttention" else 48, 32)
    with torch.inference_mode():
        sampled = layer(x, *extra)
    torch.testing.assert_close(layer(x, *extra), sampled)
    target = tokens(x.shape[1], 32, seed=5)
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = F.mse_loss(layer(x, *extra), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", LAYERS)
def test_autocast(name):
    """Parameters in fp32, products in bf16."""
    make, extra = LAYERS[name]
    layer = make()
    random_parameters(layer)
    extra = (tokens(1, 32)[:, 0],) if extra == "time" else extra
    x = tokens(35 if name == "UDiTAttention" else 48, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, *extra)
    out.float().square().sum().backward()
    truth = layer.double()(x.double(), *(t.double() if isinstance(t, torch.Tensor) else t for t in extra))
    assert (out - truth).abs().max() < 0.1 * truth.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", ["DiffiTAttention", "PTDiTAttention"])
def test_compiled(name):
    make, extra = LAYERS[name]
    layer = make()
    random_parameters(layer)
    extra = (tokens(1, 32)[:, 0],) if extra == "time" else extra
    x = tokens(48, 32).requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager")
    results = [torch.autograd.grad(f(x, *extra).square().sum(), x)[0] for f in (layer, compiled)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", LAYERS)
def test_tokens_that_do_not_fit(name):
    make, extra = LAYERS[name]
    extra = (tokens(1, 32)[:, 0],) if extra == "time" else extra
    with pytest.raises(ValueError, match="x has shape"):
        make()(tokens(48, 16), *extra)
    if name != "LinFusionAttention":
        with pytest.raises(ValueError, match="x has shape"):
            make()(tokens(47, 32), *extra)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: m.MaskGWMAttention(48, 5), "heads=5"),
        (lambda: m.MaskGWMAttention(48, 2, "diagonal"), "kind='diagonal'"),
        (lambda: m.UDiTAttention(36, 2, cosine=True), "4 divides"),
        (lambda: m.UDiTAttention(48, 2, kernel=4), "kernel=4"),
        (lambda: m.UDiTAttention(48, 2, factor=0), "factor=0"),
        (lambda: m.PTDiTAttention(48, 2, (1, 0, 2)), "window"),
        (lambda: m.PTDiTAttention(48, 2, proxy="last"), "proxy='last'"),
        (lambda: WindowAttention(48, 2, (2, 2), (2, 0)), "shift"),
        (lambda: m.DiT3DAttention(48, 2, (4, 4, 4), pad="mask"), "pad='mask'"),
        (lambda: m.DiT3DAttention(48, 2, (4, 4)), "grid"),
        (lambda: m.HDiTAttention(48, 2, 4), "kernel=4"),
        (lambda: m.HDiTAttention(40, 2), "8 divides"),
        (lambda: m.MediatorAttention(48, 2, (4, 4), 12), "mediators=12"),
        (lambda: m.DiffiTAttention(48, 2, (4, 4))(tokens(16, 48), tokens(1, 20)[:, 0]), "t has shape"),
    ],
)
def test_bad_options(make, match):
    with pytest.raises(ValueError, match=match):
        make()
