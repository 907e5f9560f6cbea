"""Work at some rows of a sequence only: whole blocks with their queries at these rows, and losses over them.

In a block, attention alone mixes tokens. What is wanted at some rows needs keys and values of all tokens, but queries,
output projection and MLP at these rows only. That is exact, and so are the gradients. At a part f of the rows it takes
`(4 N D^2 + 4 f N^2 D + 20 f N D^2) / (24 N D^2 + 4 N^2 D)` of a DiT block's operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..masks import TokenIndex
from ..models._parts import add_gated, add_gated_then_norm, norm_options
from ..ops.attention import tile_attention
from ._layers import split
from ._transformer import backend_of, linear_part


def partial_block(block: nn.Module, x: Tensor, rows: TokenIndex, *args: Any, **kwargs: Any) -> Tensor:
    """A block at some query rows: `rows.gather(block(x, *args, **kwargs))`, without the work at the other rows.

    Args:
        block: A block of this library (with `takes_rows`: it takes `rows` itself), one of the original DiT or SiT code
            (`attn.qkv`, `attn.proj`), or diffusers' `BasicTransformerBlock` (DiT, PixArt) or `JointTransformerBlock`
            (SD3; the rows of the latent stream alone).
        x: `(B, N, D)`.
        rows: Query rows.
        *args: The block's other arguments.
        **kwargs: Likewise.

    Returns:
        `(B, K, D)`.

    Raises:
        TypeError: The block is of another kind, or has parts that mix tokens in another way.
    """
    kind = kind_of(block)
    if kind == "own":
        return block(x, *args, rows=rows, **kwargs)
    run: Any = {"basic": _basic, "joint": _joint, "original": _original}[kind]
    return run(block, x, rows, *args, **kwargs)


def kind_of(block: nn.Module) -> str:
    """How a block runs in part: `"own"`, `"original"`, `"basic"` or `"joint"`.

    Raises:
        TypeError: It is not known how.
    """
    if getattr(block, "takes_rows", False):
        return "own"
    name = type(block).__name__
    if name in ("BasicTransformerBlock", "JointTransformerBlock"):
        return "basic" if name == "BasicTransformerBlock" else "joint"
    children = block._modules
    attn = getattr(children.get("attn"), "_modules", {})
    if {"norm1", "norm2", "mlp", "adaLN_modulation"} <= children.keys() and {"qkv", "proj"} <= attn.keys():
        return "original"
    raise TypeError(
        f"block is a {name}; known are AdaLNBlock, PreNormBlock, blocks of the original DiT code, and diffusers' "
        "BasicTransformerBlock and JointTransformerBlock"
    )


def _original(block: Any, x: Tensor, rows: TokenIndex, c: Tensor) -> Tensor:
    """DiT's and SiT's block, whose attention is timm's."""
    attn = block.attn
    for name in ("attn_drop", "proj_drop"):
        if block.training and getattr(getattr(attn, name, None), "p", 0.0):
            raise TypeError(f"block.attn.{name} is active; partial execution has no dropout")
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.adaLN_modulation(c).chunk(6, dim=1)
    y: Any = ops.norm_modulate(x, scale_msa, shift_msa, **norm_options(block.norm1))
    width = y.shape[-1]
    q = linear_part(attn.qkv, rows.gather(y), slice(0, width)).unflatten(-1, (attn.num_heads, -1))
    k, v = split(linear_part(attn.qkv, y, slice(width, 3 * width)), 2, attn.num_heads)
    q, k = (norm(t) if norm is not None else t for norm, t in zip(_head_norms(attn), (q, k)))
    a = attn.proj(tile_attention(q, k, v, scale=getattr(attn, "scale", None), backend=backend_of(q)).flatten(2))
    x, y = add_gated_then_norm(rows.gather(x), a, gate_msa, scale_mlp, shift_mlp, **norm_options(block.norm2))
    return add_gated(x, block.mlp(y), gate_mlp)


def _head_norms(attn: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    return getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)


def _basic(
    block: Any,
    x: Tensor,
    rows: TokenIndex,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """The block of diffusers with adaLN-Zero or adaLN-single."""
    if block.norm_type not in ("ada_norm_zero", "ada_norm_single") or block.only_cross_attention:
        raise TypeError(f"block has norm_type {block.norm_type!r}; known are 'ada_norm_zero' and 'ada_norm_single'")
    if block.pos_embed is not None or attention_mask is not None or cross_attention_kwargs:
        raise TypeError("a block with positions of its own, a mask or attention arguments cannot run in part")
    if block.norm_type == "ada_norm_zero":
        emb = block.norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
        modulation = block.norm1.linear(block.norm1.silu(emb)).chunk(6, dim=1)
        norm1, norm2 = block.norm1.norm, block.norm3
    else:
        assert timestep is not None
        modulation = (block.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)).unbind(1)
        norm1, norm2 = block.norm1, block.norm2
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
    y: Any = ops.norm_modulate(x, scale_msa, shift_msa, **norm_options(norm1))
    a = block.attn1(rows.gather(y), encoder_hidden_states=y)
    x = add_gated(rows.gather(x), a, gate_msa)
    if block.attn2 is not None:
        given = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
        x = x + block.attn2(x, **given)
    y = ops.norm_modulate(x, scale_mlp, shift_mlp, **norm_options(norm2))
    return add_gated(x, block.ff(y), gate_mlp)


def _joint(
    block: Any,
    x: Tensor,
    rows: TokenIndex,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """SD3's block: latent queries at the rows, keys and values of all latent tokens and of the text."""
    if block.use_dual_attention or joint_attention_kwargs:
        raise TypeError("a JointTransformerBlock with dual attention or attention arguments cannot run in part")
    attn = block.attn
    y, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.norm1(x, emb=temb)
    if block.context_pre_only:
        context = block.norm1_context(encoder_hidden_states, temb)
    else:
        context = block.norm1_context(encoder_hidden_states, emb=temb)[0]

    def heads(t: Tensor, norm: nn.Module | None) -> Tensor:
        t = t.unflatten(-1, (attn.heads, -1))
        return t if norm is None else norm(t)

    q = heads(attn.to_q(rows.gather(y)), attn.norm_q)
    keys = heads(attn.to_k(y), attn.norm_k), heads(attn.add_k_proj(context), attn.norm_added_k)
    values = heads(attn.to_v(y), None), heads(attn.add_v_proj(context), None)
    a = tile_attention(q, torch.cat(keys, 1), torch.cat(values, 1), backend=backend_of(q)).flatten(2)
    x = add_gated(rows.gather(x), attn.to_out[1](attn.to_out[0](a)), gate_msa)
    y = ops.norm_modulate(x, scale_mlp, shift_mlp, **norm_options(block.norm2))
    return add_gated(x, block.ff(y), gate_mlp)


# ------------------------------------------------------------------------------------------------------ losses
def token_mean(values: Tensor, index: TokenIndex | None, *, dropped: bool = False) -> Tensor:
    """The mean of per-token values over the kept tokens of each sample, or over the dropped ones.

    Args:
        values: `(B, N)`, or `(B, K)`: those of the kept tokens alone.
        index: Kept tokens; None: all.
        dropped: Over the dropped ones instead; 0 where there are none.

    Returns:
        `(B,)`.

    Raises:
        ValueError: `values` has another number of tokens.
    """
    if index is None:
        return values.mean(1) if not dropped else values.sum(1) * 0.0
    if values.shape[1] == index.n:
        weight = index.mask if not dropped else ~index.mask
    elif values.shape[1] == index.kept and not dropped:
        weight = index.keep < index.n
    else:
        raise ValueError(f"values has shape {tuple(values.shape)}; the index keeps {index.kept} of {index.n} tokens")
    weight = weight.to(values.dtype)
    return (values * weight).sum(1) / weight.sum(1).clamp(min=1)


def per_token(error: Tensor, patch: int) -> Tensor:
    """The mean of an image's values `(B, C, H, W)` over each patch: `(B, tokens)` in raster order.

    Raises:
        ValueError: `patch` does not divide the image.
    """
    height, width = error.shape[-2:]
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"patch={patch} does not divide the image {height} x {width}")
    return torch.nn.functional.avg_pool2d(error.mean(1, keepdim=True), patch).flatten(1)


def patches(image: Tensor, patch: int) -> Tensor:
    """An image `(B, C, H, W)` as tokens `(B, N, patch * patch * C)`, channels innermost.

    Raises:
        ValueError: `patch` does not divide the image.
    """
    height, width = image.shape[-2:]
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"patch={patch} does not divide the image {height} x {width}")
    x = image.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, h, p, w, q)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatch(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The inverse of `patches` for tokens of a grid (h, w)."""
    x = tokens.unflatten(1, grid).unflatten(3, (patch, patch, -1))  # (B, h, w, p, q, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
