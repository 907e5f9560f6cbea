"""Training methods read no value of the device (on meta tensors they would fail), and train in bf16 and autocast."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maskaccel import methods as m
from maskaccel.masks import TokenIndex

BATCH, N, DIM, HEADS, GRID = 2, 24, 32, 2, (4, 6)


class Call(nn.Module):
    """A module and what a step of its training calls."""

    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, index, *args):
        return self.call(self.module, index, *args)


def tokens(width=DIM, count=N):
    return torch.randn(BATCH, count, width)


CASES = {
    "MDT": lambda: (m.MDTTransformer(DIM, 4, HEADS, GRID, decode_layer=2), _direct, tokens(), tokens()[:, 0]),
    "X-MDPT": lambda: (
        m.XMDPTTransformer(DIM, 3, HEADS, GRID),
        lambda f, i, x, c, s: f(x, c, s, i),
        tokens(),
        tokens()[:, 0],
        tokens(),
    ),
    "ITA-MDT": lambda: (m.ITAMDTTransformer(DIM, 4, HEADS, GRID, decode_layer=2), _direct, tokens(), tokens(count=5)),
    "Yume": lambda: (
        m.YumeTransformer(DIM, 2, HEADS, qk_norm="rms"),
        lambda f, i, x, c, cos, sin: f(x, c, (cos.float(), sin.float()), i),
        tokens(),
        tokens(),
        torch.rand(N, DIM // HEADS // 2),
        torch.rand(N, DIM // HEADS // 2),
    ),
    "MaskDiT": lambda: (
        m.MaskDiTTransformer(DIM, 1, HEADS, GRID, 8, decoder_width=32, decoder_depth=1, decoder_heads=2),
        _direct,
        tokens(),
        tokens()[:, 0],
    ),
    "MicroDiT": lambda: (
        m.MicroDiTTransformer(DIM, 2, 16, 8, experts=4, multiple=8, mixer_width=48, mixer_depth=2),
        lambda f, i, x, y, c: f(x, y, c, i),
        tokens(),
        tokens(count=3),
        tokens()[:, 0],
    ),
    "SPRINT": lambda: (
        m.SprintFusion(DIM, learn_mask=True),
        lambda f, i, x, g: f(x, g, i, f.drawn(BATCH, torch.ones(1, dtype=torch.int64, device=x.device))),
        tokens(),
        tokens(count=12),
    ),
    "SPRINT, guided": lambda: (m.SprintFusion(DIM), lambda f, i, x: f.without_middle(x), tokens()),
    "DiffMAE": lambda: (
        m.DiffMAE(8, GRID, DIM, 1, HEADS, width=32, decoder_depth=1, decoder_heads=2),
        lambda f, i, x, e, a: f.loss(x, i, torch.full((BATCH,), 3, device=x.device), e, a.float()),
        tokens(8),
        tokens(8, 12),
        torch.rand(10),
    ),
    "UMD": lambda: (m.UMD(DIM, 1, HEADS, GRID, 8, decoder_depth=1), _direct, tokens(), tokens()[:, 0]),
    "MAR": lambda: (
        m.MAR(4, GRID, DIM, 1, HEADS, buffer=3, head_width=32, head_depth=1),
        lambda f, i, x, c: f.loss(x, c, i.shift(3)),
        tokens(4),
        tokens()[:, 0],
    ),
    "MaskGWM": lambda: (
        m.MaskGWMReconstruction(DIM, HEADS, (2, 3, 4), noise=4, temporal=True),
        lambda f, i, x, c, e: f(x, c, _rows(x.device), c[:, 0], e, c[:, 0] > 0),
        tokens(count=12),
        tokens()[:, 0],
        tokens(4),
    ),
    "FiT": lambda: (
        m.FiTBlocks(DIM, 1, HEADS, rank=8),
        lambda f, i, x, c: f(x, c, m.Packing(((4, 6),))),
        tokens()[:1],
        tokens()[:1, 0],
    ),
}


def _direct(module, index, x, c):
    return module(x, c, index)


def _index(device):
    keep = torch.arange(0, N, 2, dtype=torch.int32).expand(BATCH, -1).contiguous()
    return TokenIndex.from_keep(keep, N).to(device)


def _rows(device):
    keep = torch.arange(N, dtype=torch.int32).view(6, 4)[:, :2].flatten().expand(BATCH, -1).contiguous()
    return TokenIndex.from_keep(keep, N).to(device)


def _made(name):
    torch.manual_seed(0)
    module, call, *given = CASES[name]()
    with torch.no_grad():  # nothing hides behind an initialisation at zero
        for p in module.parameters():
            p.add_(torch.randn(p.shape) * 0.05)
    return Call(module, call), given


@pytest.mark.parametrize("name", CASES)
def test_no_value_is_read(name):
    step, given = _made(name)
    step, given = step.to("meta"), [t.to("meta") for t in given]
    out = step(_index("meta"), *given)
    assert out.device.type == "meta"
    out.sum().backward()


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("FiT", "SPRINT, guided", "MaskGWM")])
def test_an_index_for_all_samples(name):
    step, given = _made(name)
    shared = TokenIndex.from_keep(torch.arange(0, N, 2), N)
    outs = []
    for index in (shared, shared.expand(BATCH)):
        torch.manual_seed(1)
        outs.append(step(index, *given))
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize("name", ["MDT", "SPRINT"])
def test_one_graph(name):
    step, given = _made(name)
    out = torch.compile(step, backend="eager", fullgraph=True)(_index("cpu"), *given)
    assert torch.equal(out, step(_index("cpu"), *given))
    torch._dynamo.reset()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_bf16_is_near_fp32(name, autocast):
    step, given = _made(name)
    torch.manual_seed(1)
    want = step(_index("cpu"), *given)
    if not autocast:
        step, given = step.bfloat16(), [t.bfloat16() for t in given]
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = step(_index("cpu"), *given)
    if name != "MAR":  # draws its noise in the dtype of the tokens
        assert (out.float() - want).abs().mean() < 0.05 * want.abs().mean()
    out.float().square().mean().backward()
    for p in step.parameters():
        assert p.grad is None or p.grad.isfinite().all()
