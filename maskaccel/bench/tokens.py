"""The token ops of the benchmark table: shapes of models, inputs, our calls, and the lines that others run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..masks import TokenIndex
from .eager import Inputs

Shape = tuple[int, ...]
Outputs = tuple[Tensor, ...]

KEPT = 0.5  # TREAD's share; of K/V rows a quarter is written
# (batch, tokens, vocabulary)
VOCABULARIES: dict[str, Shape] = {
    "aMUSEd 256px": (2, 256, 8256),
    "MaskGIT 256px": (8, 256, 1024),
    "LLaDA-8B block": (1, 64, 126464),
}
# (batch, tokens, width) of training batches
TRAINED: dict[str, Shape] = {
    "SiT-XL/2 256px": (32, 256, 1152),
    "DiT-XL/2 512px": (8, 1024, 1152),
    "FLUX.1 1024px": (1, 4608, 3072),
}
HEADS: dict[str, Shape] = {
    "SD3.5-medium 1024px": (2, 4096, 24, 64),
    "FLUX.1 1024px": (1, 4608, 24, 128),
}


def _index(batch: int, n: int, device: torch.device) -> TokenIndex:
    return ops.random_keep(batch, n, KEPT, seed=0, device=device)


def _at(index: TokenIndex, width: int) -> Tensor:
    """The repeated int64 index that `torch.gather` asks for."""
    return index.keep.long().unsqueeze(-1).expand(-1, -1, width)


def _rows(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
    batch, n, width = shape
    index = _index(batch, n, device)
    parts = (torch.randn(batch, 6 * width, generator=g) * 0.3).to(device=device, dtype=dtype).chunk(6, dim=1)
    return {
        "x": torch.randn(shape, generator=g).to(device=device, dtype=dtype),
        "rows": torch.randn(batch, index.kept, width, generator=g).to(device=device, dtype=dtype),
        "scale": parts[1],
        "shift": parts[0],
        "index": index,
    }


def _run_gather(i: Inputs, backend: str | None) -> Outputs:
    return (ops.gather_rows(i["x"], i["index"], backend=backend),)


def _eager_gather(i: Inputs) -> Outputs:
    return (i["x"].gather(1, _at(i["index"], i["x"].shape[-1])),)


def _run_merge(i: Inputs, backend: str | None) -> Outputs:
    return (ops.scatter_merge(i["x"], i["rows"], i["index"], backend=backend),)


def _eager_merge(i: Inputs) -> Outputs:
    """TREAD: the kept rows are scattered into a copy of the stash."""
    return (i["x"].clone().scatter(1, _at(i["index"], i["x"].shape[-1]), i["rows"]),)


def _run_modulate(i: Inputs, backend: str | None) -> Outputs:
    rows, y = ops.gather_modulate(i["x"], i["index"], i["scale"], i["shift"], backend=backend)
    assert rows is not None
    return rows, y


def _eager_modulate(i: Inputs) -> Outputs:
    (rows,) = _eager_gather(i)
    norm = F.layer_norm(rows, (rows.shape[-1],), None, None, 1e-6)
    return rows, norm * (1 + i["scale"][:, None]) + i["shift"][:, None]


def _fused(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
    made, width = _rows(shape, dtype, device, g), shape[-1]
    weight = torch.randn(width, 2 * width, generator=g) * (2 * width) ** -0.5
    vectors = {name: (torch.randn(width, generator=g)).to(device=device, dtype=dtype) for name in ("bias", "token")}
    return {**made, "weight": weight.to(device=device, dtype=dtype), **vectors}


def _run_fuse(i: Inputs, backend: str | None) -> Outputs:
    operands = (i["x"], i["rows"], i["index"], i["weight"], i["bias"], i["token"])
    return (ops.sparse_dense_fuse(*operands, backend=backend),)


def _eager_fuse(i: Inputs) -> Outputs:
    """SPRINT: padded with the mask token, concatenated, projected."""
    padded = i["token"].expand_as(i["x"]).scatter(1, _at(i["index"], i["x"].shape[-1]), i["rows"])
    return (F.linear(torch.cat([padded, i["x"]], dim=-1), i["weight"], i["bias"]),)


def _merged(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
    _, n, _ = shape
    x = torch.randn(shape, generator=g).to(device=device, dtype=dtype)
    side = math.isqrt(n)
    grid = (side, side) if side * side == n else (2, n // 2)
    merge = ops.match_tokens(x, 0.5, grid=grid, seed=0)
    y = torch.randn(shape[0], merge.merged, shape[2], generator=g).to(device=device, dtype=dtype)
    return {"x": x, "y": y, "merge": merge}


def _run_merge_tokens(i: Inputs, backend: str | None) -> Outputs:
    return (ops.merge_tokens(i["x"], i["merge"], backend=backend),)


def _eager_merge_tokens(i: Inputs) -> Outputs:
    """`scatter_reduce` to means, as tomesd."""
    x, merge = i["x"], i["merge"]
    at = merge.slot.long().unsqueeze(-1).expand_as(x)
    out = x.new_zeros(x.shape[0], merge.merged, x.shape[2])
    return (out.scatter_reduce(1, at, x, "mean", include_self=False),)


def _run_unmerge_tokens(i: Inputs, backend: str | None) -> Outputs:
    return (ops.unmerge_tokens(i["y"], i["merge"], backend=backend),)


def _eager_unmerge_tokens(i: Inputs) -> Outputs:
    return (i["y"].gather(1, i["merge"].slot.long().unsqueeze(-1).expand(-1, -1, i["y"].shape[2])),)


def _cached(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
    batch, n, heads, dim = shape
    index = ops.random_keep(1, n, 0.25, seed=0, device=device)
    fresh = {
        name: torch.randn(batch, index.kept, heads, dim, generator=g).to(device=device, dtype=dtype) for name in "qkv"
    }
    caches = {name: torch.randn(shape, generator=g).to(device=device, dtype=dtype) for name in ("k_cache", "v_cache")}
    frequency = 1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.outer(torch.arange(n, dtype=torch.float64), frequency).repeat_interleave(2, dim=1)
    tables = {"cos": angle.cos().float().to(device), "sin": angle.sin().float().to(device)}
    weights = {
        f"{name}_weight": (1 + 0.1 * torch.randn(dim, generator=g)).to(device=device, dtype=dtype) for name in "qk"
    }
    return {**fresh, **caches, **tables, **weights, "index": index}


def _run_write(i: Inputs, backend: str | None) -> Outputs:
    q = ops.write_kv_rows(
        i["k"], i["v"], i["k_cache"], i["v_cache"], i["index"], q=i["q"], q_weight=i["q_weight"],
        k_weight=i["k_weight"], cos=i["cos"], sin=i["sin"], norm="rms", backend=backend,
    )  # fmt: skip
    assert q is not None
    return q, i["k_cache"], i["v_cache"]


def _eager_write(i: Inputs) -> Outputs:
    """RMSNorm, the rotary embedding at gathered rows of the table, and two indexed writes."""
    at = i["index"].keep[0].long()
    cos, sin = i["cos"][at][:, None], i["sin"][at][:, None]

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        x = F.rms_norm(x, (x.shape[-1],), weight, 1e-6)
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return (x.float() * cos + torch.stack((-second, first), dim=-1).flatten(-2).float() * sin).to(x.dtype)

    q, k = turned(i["q"], i["q_weight"]), turned(i["k"], i["k_weight"])
    i["k_cache"].index_copy_(1, at, k)
    i["v_cache"].index_copy_(1, at, i["v"])
    return q, i["k_cache"], i["v_cache"]


def _stored(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
    cache = torch.randn(shape, generator=g).to(torch.float8_e4m3fn).to(device)
    # a tensor of 8-bit floats would be widened for the truth
    return {"bits": cache.view(torch.uint8), "scale": torch.rand(shape[:3], generator=g).to(device), "like": dtype}


def _run_read(i: Inputs, backend: str | None) -> Outputs:
    out = ops.read_kv_rows(i["bits"].view(torch.float8_e4m3fn), i["scale"].float(), i["like"], backend=backend)
    return (out,)


def _eager_read(i: Inputs) -> Outputs:
    return ((i["bits"].view(torch.float8_e4m3fn).float() * i["scale"].float().unsqueeze(-1)).to(i["like"]),)


def _logits(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
    batch, n, size = shape
    masked = torch.rand(batch, n, generator=g) < 0.75
    return {
        "logits": (torch.randn(shape, generator=g) * 3).to(device=device, dtype=dtype),
        "tokens": torch.where(masked, size, 0).to(device),
        "mask": size,
        "n": max(1, n // 16),
    }


def _run_unmask(i: Inputs, backend: str | None) -> Outputs:
    args = (i["logits"], i["tokens"], i["mask"], i["n"])
    tokens, confidence = ops.confidence_unmask(*args, temperature=0.0, backend=backend)
    return tokens.float(), _finite(confidence)


def _finite(confidence: Tensor) -> Tensor:
    return confidence.masked_fill(confidence.isinf(), 2.0)


def _eager_unmask(i: Inputs) -> Outputs:
    """LLaDA's low-confidence remasking: a softmax of fp64 over all positions, then top-k for each sample."""
    masked = i["tokens"] == i["mask"]
    p = i["logits"].double().softmax(-1)
    best, ids = p.max(-1)
    confidence = torch.where(masked, best, -math.inf)
    tokens = i["tokens"].clone()
    for b in range(tokens.shape[0]):
        at = confidence[b].topk(min(i["n"], int(masked[b].sum()))).indices
        tokens[b, at] = ids[b, at]
    return tokens.float(), torch.where(masked, best, 2.0).float()


def _scores(shape: Shape, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Inputs:
    batch, n, _ = shape
    score = torch.rand(batch, n, generator=g).to(device)
    return {"score": score, "age": torch.randint(0, 5, (batch, n), generator=g, dtype=torch.int32).to(device)}


def _run_select(i: Inputs, backend: str | None) -> Outputs:
    index, age = ops.select_active(i["score"].float(), i["age"], KEPT, backend=backend)
    return index.keep.float(), age.float()


def _eager_select(i: Inputs) -> Outputs:
    """RAS: weighted by age, sorted, cut, sorted again; ages updated by the mask."""
    metric = i["score"].float() * torch.exp(0.1 * i["age"].double()).float()
    n = metric.shape[1]
    keep = metric.sort(dim=1, descending=True, stable=True).indices[:, : n - int(n * (1 - KEPT))].sort(dim=1).values
    age = (i["age"] + 1).scatter(1, keep, 0)
    return keep.float(), age.float()


def entries(make: Callable[..., Any]) -> tuple[Any, ...]:
    """The table's entries, made by its `Op`."""
    dims, heads = "batch, tokens, width", "batch, tokens, heads, head dim"

    def elements(count: float) -> Callable[[Shape], int]:
        return lambda shape: int(count * math.prod(shape))

    return (
        make("gather_rows", dims, TRAINED, _rows, _run_gather, _eager_gather, ("rows",), ("x",),
             elements=elements(2 * KEPT), elements_backward=elements(1 + KEPT)),
        make("gather_modulate", dims, TRAINED, _rows, _run_modulate, _eager_modulate, ("rows", "y"),
             ("x", "scale", "shift"), elements=elements(3 * KEPT), elements_backward=elements(1 + 3 * KEPT)),
        make("scatter_merge", dims, TRAINED, _rows, _run_merge, _eager_merge, ("out",), ("x", "rows"),
             elements=elements(2), elements_backward=elements(2 + KEPT)),
        make("sparse_dense_fuse", dims, TRAINED, _fused, _run_fuse, _eager_fuse, ("h",),
             ("x", "rows", "weight", "bias", "token"),
             elements=elements(4 + 2 * KEPT), elements_backward=elements(5 + 3 * KEPT), kernel="scatter_merge"),
        make("merge_tokens", dims, TRAINED, _merged, _run_merge_tokens, _eager_merge_tokens, ("y",), ("x",),
             elements=elements(1.5), elements_backward=elements(1.5), kernel="segment_rows"),
        make("unmerge_tokens", dims, TRAINED, _merged, _run_unmerge_tokens, _eager_unmerge_tokens, ("x",), ("y",),
             elements=elements(1.5), elements_backward=elements(1.5), kernel="unmerge_rows"),
        make("select_active", dims, TRAINED, _scores, _run_select, _eager_select, ("keep", "age"), (),
             elements=lambda shape: 3 * shape[0] * shape[1]),
        make("write_kv_rows", heads, HEADS, _cached, _run_write, _eager_write, ("q", "k_cache", "v_cache"), (),
             elements=elements(1.5)),
        make("read_kv_rows", heads, HEADS, _stored, _run_read, _eager_read, ("cache",), (), elements=elements(1.5)),
        make("confidence_unmask", "batch, tokens, vocabulary", VOCABULARIES, _logits, _run_unmask, _eager_unmask,
             ("tokens", "confidence"), (), elements=elements(0.75), kernel="sample_logits"),
    )  # fmt: skip
