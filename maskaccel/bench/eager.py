"""Eager baselines: the lines that diffusers 0.42 runs at each site, on the same tensors as our ops.

Nothing here is tuned for or against eager. Each function says where its lines come from.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Inputs = dict[str, Any]


def norm_modulate(i: Inputs) -> tuple[Tensor, ...]:
    """`AdaLayerNormZero.forward` (DiT, SD3, Flux): LayerNorm without affine, then modulation."""
    x = i["x"]
    return (F.layer_norm(x, (x.shape[-1],), None, None, 1e-6) * (1 + i["scale"][:, None]) + i["shift"][:, None],)


def gate_residual_norm_modulate(i: Inputs) -> tuple[Tensor, ...]:
    """Middle of `JointTransformerBlock` and `FluxTransformerBlock`: gate, residual, norm2, modulation."""
    r = i["x"] + i["gate"].unsqueeze(1) * i["a"]
    n = F.layer_norm(r, (r.shape[-1],), None, None, 1e-6)
    return r, n * (1 + i["scale"][:, None]) + i["shift"][:, None]


def gate_residual(i: Inputs) -> tuple[Tensor, ...]:
    """Last lines of the same blocks."""
    return (i["x"] + i["gate"].unsqueeze(1) * i["a"],)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rotary_emb(..., sequence_dim=1)` of diffusers, or the same arithmetic where diffusers is not installed."""
    try:
        from diffusers.models.embeddings import apply_rotary_emb
    except ImportError:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-second, first), dim=-1).flatten(-2)
        return (x.float() * cos[:, None].to(x.device) + turned.float() * sin[:, None].to(x.device)).to(x.dtype)
    return apply_rotary_emb(x, (cos, sin), sequence_dim=1)


def qk_norm_rope(i: Inputs) -> tuple[Tensor, ...]:
    """`FluxAttnProcessor`: `torch.nn.RMSNorm` of q and k, then the rotary embedding."""
    q, k = i["norm_q"](i["q"]), i["norm_k"](i["k"])
    return _rotary(q, i["cos"], i["sin"]), _rotary(k, i["cos"], i["sin"])


def swiglu(i: Inputs) -> tuple[Tensor, ...]:
    """`SwiGLU.forward` after its projection."""
    hidden, gate = i["x"].chunk(2, dim=-1)
    return (hidden * F.silu(gate),)


def geglu(i: Inputs) -> tuple[Tensor, ...]:
    """`GEGLU.forward` after its projection."""
    hidden, gate = i["x"].chunk(2, dim=-1)
    return (hidden * F.gelu(gate),)


def relative_difference(i: Inputs) -> tuple[Tensor, ...]:
    """The comparison in diffusers' first-block cache (mean |x - ref|, mean |ref|), as two sums a sample."""
    difference = (i["x"] - i["reference"]).abs().flatten(1).sum(1, dtype=torch.float32)
    return (torch.stack((difference, i["reference"].abs().flatten(1).sum(1, dtype=torch.float32)), dim=1),)


def combine_history(i: Inputs) -> tuple[Tensor, ...]:
    """The prediction of diffusers' TaylorSeer cache (a running sum from zeros), then the gated residual."""
    history = i["history"]
    total = torch.zeros_like(history[0])
    for k, coefficient in enumerate(i["coefficients"]):
        total = total + history[k] * coefficient
    return (i["x"] + i["gate"].unsqueeze(1) * total,)


def combine_sites(i: Inputs) -> tuple[Tensor, ...]:
    """`combine_history` of one site after the other, as the blocks of a cached step run it."""
    x = i["x"]
    for s, gate in enumerate(i["gates"]):
        (x,) = combine_history({**i, "history": i["history"][s], "x": x, "gate": gate})
    return (x,)


def gram(i: Inputs) -> tuple[Tensor, ...]:
    """A matrix product in fp64: dynamic mode decomposition needs the digits."""
    flat = i["history"].flatten(1).double()
    return (flat @ flat.T,)


def scatter_combine(i: Inputs) -> tuple[Tensor, ...]:
    """The update of ClusCa's cache (scatter, mean of a cluster, blend), then the prediction and the gated residual."""
    newest, fresh, index, labels = i["history"][0], i["fresh"], i["index"].long(), i["labels"].long()
    width = newest.shape[-1]
    newest.scatter_(1, index[..., None].expand(-1, -1, width), fresh)
    if i["gamma"] > 0:
        cluster, count = labels.gather(1, index), index.shape[1]
        total = fresh.new_zeros(fresh.shape[0], count, width)
        total.scatter_add_(1, cluster[..., None].expand(-1, -1, width), fresh)
        mean = total.gather(1, labels[..., None].expand(-1, -1, width))
        newest.copy_(i["gamma"] * mean + (1 - i["gamma"]) * newest)
    return combine_history(i)


def kmeans(i: Inputs) -> tuple[Tensor, ...]:
    """L1 distances by `cdist`, means by a product with one-hot labels; without the check for convergence."""
    x, k = i["x"].float(), i["k"]
    n = x.shape[1]
    centroids = x[:, (2 * torch.arange(k, device=x.device) + 1) * n // (2 * k)]
    for _ in range(i["iters"]):
        labels = torch.cdist(x, centroids, p=1).argmin(-1)
        member = torch.nn.functional.one_hot(labels, k).mT.to(x.dtype)
        centroids = member @ x / member.sum(-1, keepdim=True)
    torch.cdist(x, centroids, p=1).argmin(-1)
    return (centroids,)


def combine_history_norm_modulate(i: Inputs) -> tuple[Tensor, ...]:
    """`combine_history`, then the norm and modulation of the next site."""
    (h,) = combine_history(i)
    return h, *norm_modulate({**i, "x": h})


def norm_modulate_difference(i: Inputs) -> tuple[Tensor, ...]:
    """The modulated input of TeaCache, and its comparison with the last one."""
    (y,) = norm_modulate(i)
    return y, *relative_difference({"x": y, "reference": i["reference"]})
