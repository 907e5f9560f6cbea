"""SPRINT's fusion of a sparse and a dense stream as a split matrix product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from . import _run
from .rows import scatter_merge

if TYPE_CHECKING:
    from ...masks.tokens import TokenIndex


def sparse_dense_fuse(
    f: Tensor,
    g: Tensor,
    index: TokenIndex,
    weight: Tensor,
    bias: Tensor | None = None,
    mask_token: Tensor | None = None,
    path_keep: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """`W [g_pad ; f] + b` without the padded `g` and without the concatenation; differentiable.

    The fusion of SPRINT (Park et al. 2025, arXiv 2510.21986): g_pad is `g` at the kept tokens and the mask token
    elsewhere. With `W = [W_g | W_f]` dropped tokens need `W_f f + b + W_g m` and kept ones `W_f f + b + W_g g`, so the
    products cost `2 N D^2 + 2 K D^2` in place of `4 N D^2` multiplications, and the vector `W_g m` is formed once.

    Args:
        f: `(B, N, D)` dense stream (shallow features of all tokens).
        g: `(B, K, D)` sparse stream of the kept tokens, dtype of `f`.
        index: Which tokens are kept.
        weight: `(E, 2 D)`, the columns of `g` first.
        bias: `(E,)` or None.
        mask_token: D elements in any shape; None is zeros.
        path_keep: Bool `(B,)`: samples that see `g`; the others see the mask token everywhere (path drop). None: all.
        backend: Of the merge, as in `maskaccel.ops.norm_modulate`.

    Returns:
        `(B, N, E)`.

    Raises:
        TypeError: Dtypes differ, or are not allowed.
        ValueError: Shapes do not fit.
    """
    f, g = _checks.activation("f", f), _checks.activation("g", g, "B, K, D")
    batch, n, width = f.shape
    index = _run.index_fits(index, batch, n, f, "f")
    if tuple(g.shape) != (batch, index.kept, width):
        raise ValueError(f"g has shape {tuple(g.shape)}; it must be {(batch, index.kept, width)}")
    weight = _checks.floating("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != 2 * width:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be (E, {2 * width})")
    _checks.vector("bias", bias, weight.shape[0], f)
    if path_keep is not None:
        path_keep = _checks.tensor("path_keep", path_keep)
        if path_keep.dtype != torch.bool or tuple(path_keep.shape) != (batch,):
            raise ValueError(f"path_keep is {path_keep.dtype} {tuple(path_keep.shape)}; it must be bool ({batch},)")
    w_g, w_f = weight[:, :width], weight[:, width:]
    base, sparse = F.linear(f, w_f, bias), F.linear(g, w_g)
    wide = torch.float64 if f.dtype == torch.float64 else torch.float32
    if mask_token is None:
        token = torch.zeros(weight.shape[0], dtype=wide, device=f.device)
    else:
        mask_token = _checks.floating("mask_token", mask_token).reshape(-1)
        _checks.vector("mask_token", mask_token, width, f)
        # Summed as a tree, both ways: a product with one vector adds term after term, and many rows read this.
        token = (w_g.to(wide) * mask_token.to(wide)).sum(-1)
    if path_keep is not None:
        sparse = torch.where(path_keep[:, None, None], sparse, token.to(sparse.dtype))
    return scatter_merge(None, sparse, index, mode="mask_token", mask_token=token, pos=base, backend=backend)
