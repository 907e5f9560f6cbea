"""What every self-attention layer does: train, autocast, compile, refuse."""

from __future__ import annotations

import pytest
import torch
from _attention_layers import random_parameters, tokens
from torch.nn import functional as F

from maskaccel import methods as m
from maskaccel.methods.pt_dit import WindowAttention

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
