"""The attention ops of the benchmark table: shapes of models, inputs, our calls, and plain torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..masks import TileMask
from .eager import Inputs

Shape = tuple[int, ...]
Outputs = tuple[Tensor, ...]

DIMS = "batch, tokens, heads, head dim"
BLOCK = 64  # tile size of the measured masks

# (batch, tokens, heads, head dim): attention of one block, text and image together where a block joins them
ATTENTION: dict[str, Shape] = {
    "DiT-XL/2 512px": (2, 1024, 16, 72),
    "PixArt-alpha 1024px": (2, 4096, 16, 72),
    "SD3.5-medium 1024px": (2, 4429, 24, 64),
    "FLUX.1 1024px": (1, 4608, 24, 128),
    "Wan2.1-1.3B 480p 81f": (1, 32760, 12, 128),
}


@functools.cache
def tiles(tokens: int, heads: int, kept: float, block: int = BLOCK) -> TileMask:
    """A mask of whole tiles with the same share kept in every row, at random places."""
    side = math.ceil(tokens / block)
    with torch.device("cpu"):  # whatever the default of a caller: the mask is kept for others
        scores = torch.rand(heads, side, side, generator=torch.Generator().manual_seed(0))
        chosen = scores.topk(max(1, round(kept * side)), dim=-1).indices
        keep = torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, chosen, True)
        return TileMask.from_tiles(keep, (tokens, tokens), (block, block))


def _qkv(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
    return {name: torch.randn(shape, generator=g).to(device=device, dtype=dtype) for name in ("q", "k", "v")}


def _masked(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
    return {**_qkv(shape, dtype, device, g), "mask": tiles(shape[1], shape[2], 0.25).to(device)}


def _parts(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
    batch, tokens, heads, _ = shape
    outs = {name: torch.randn(shape, generator=g).to(device=device, dtype=dtype) for name in ("out1", "out2")}
    return outs | {name: torch.randn(batch, heads, tokens, generator=g).to(device) for name in ("lse1", "lse2")}


def _rows(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
    made = _qkv(shape, dtype, device, g)
    q, k = (made[name].double().transpose(1, 2) for name in "qk")
    lse = [(q[:, h] @ k[:, h].mT * shape[3] ** -0.5).logsumexp(-1) for h in range(shape[2])]
    return {"q": made["q"], "k": made["k"], "lse": torch.stack(lse, 1).float()}


def run_attention(i: Inputs, backend: str | None) -> Outputs:
    """`tile_attention`, over a mask if the inputs have one."""
    return (ops.tile_attention(i["q"], i["k"], i["v"], i.get("mask"), backend=backend),)


def eager_attention(i: Inputs) -> Outputs:
    """Torch's attention; over a boolean mask if the inputs have one."""
    q, k, v = (i[name].transpose(1, 2) for name in "qkv")
    mask = None if i.get("mask") is None else _dense(i["mask"])
    return (torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2),)


_DENSE: dict[int, tuple[Any, Tensor]] = {}


def _dense(mask: TileMask) -> Tensor:
    """The mask as torch takes it; made once, as a user would."""
    held = _DENSE.get(id(mask))
    if held is None or held[0] is not mask:
        held = _DENSE[id(mask)] = mask, mask.to_bool()
    return held[1]


def _run_merge(i: Inputs, backend: str | None) -> Outputs:
    return ops.merge_attention(i["out1"], i["lse1"], i["out2"], i["lse2"], backend=backend)


def _eager_merge(i: Inputs) -> Outputs:
    lse = torch.logaddexp(i["lse1"], i["lse2"])
    w1, w2 = ((part - lse).exp().transpose(1, 2)[..., None] for part in (i["lse1"], i["lse2"]))
    return (i["out1"] * w1 + i["out2"] * w2).to(i["out1"].dtype), lse


def _run_linear(i: Inputs, backend: str | None) -> Outputs:
    return (ops.linear_attention(i["q"], i["k"], i["v"], backend=backend),)


def _eager_linear(i: Inputs) -> Outputs:
    q, k, v = i["q"].relu().transpose(1, 2), i["k"].relu().transpose(1, 2), i["v"].transpose(1, 2)
    z = (q.float() * k.float().sum(2, keepdim=True)).sum(-1, keepdim=True) + 1e-6
    return ((q.float() @ (k.float().mT @ v.float()) / z).to(q.dtype).transpose(1, 2),)


def _run_sums(i: Inputs, backend: str | None) -> Outputs:
    return (ops.attention_column_sums(i["q"], i["k"], i["lse"], backend=backend),)


def _eager_sums(i: Inputs) -> Outputs:
    q, k = (i[name].transpose(1, 2) for name in "qk")
    return ((q @ k.mT * q.shape[-1] ** -0.5).float().softmax(-1).sum(2),)


def entries(make: Callable[..., Any]) -> tuple[Any, ...]:
    """The table's entries, made by its `Op`."""
    qkv = ("q", "k", "v")

    def elements(count: int) -> Callable[[Shape], int]:
        return lambda shape: count * math.prod(shape)

    return (
        make("tile_attention", DIMS, ATTENTION, _qkv, run_attention, eager_attention, ("out",), qkv,
             elements=elements(4), elements_backward=elements(8)),
        make("tile_attention.quarter", DIMS, ATTENTION, _masked, run_attention, eager_attention, ("out",), qkv,
             elements=elements(4), elements_backward=elements(8)),
        make("merge_attention", DIMS, ATTENTION, _parts, _run_merge, _eager_merge, ("out", "lse"),
             ("out1", "lse1", "out2", "lse2"),
             elements=elements(3), elements_backward=elements(5)),
        make("linear_attention", DIMS, ATTENTION, _qkv, _run_linear, _eager_linear, ("out",), qkv,
             elements=elements(4), elements_backward=elements(8)),
        make("attention_column_sums", DIMS, ATTENTION, _rows, _run_sums, _eager_sums, ("sums",), (),
             elements=elements(2)),
    )  # fmt: skip
