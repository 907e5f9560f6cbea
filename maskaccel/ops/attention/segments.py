"""Attention over keys and values that lie in several places."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .api import merge_attention, tile_attention


def segment_attention(
    q: Tensor,
    segments: Sequence[tuple[Tensor, Tensor]],
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the keys of all segments together, none of which is copied.

    What partial-token inference and reference images need: a cache of the image's K and V, the text's, and those of a
    reference (FLUX Kontext, Flux2's reference K/V) stay where they are. Every segment is an attention of its own,
    joined by its log-sum-exp; differentiable. A further segment costs a pass over q's result, where a concatenation
    costs one over all K and V.

    Args:
        q: `(B, Sq, H, D)`, as in `tile_attention`.
        segments: `(k, v)`, each `(B, Sk, Hk, D)` with its own Sk; empty ones are left out.
        scale: Of the scores; None is `D ** -0.5`.
        return_lse: Return the log-sum-exp over all keys too.
        backend: As in `tile_attention`.

    Returns:
        `(B, Sq, H, D)`; with `return_lse` also fp32 `(B, H, Sq)`.

    Raises:
        TypeError: Dtypes do not fit.
        ValueError: Shapes do not fit, or no segment has keys.
    """
    parts = []
    for at, segment in enumerate(segments):
        if not isinstance(segment, tuple | list) or len(segment) != 2:
            raise TypeError(f"segments[{at}] must be (k, v), got {type(segment).__name__}")
        if segment[0].dim() != 4 or segment[0].shape[1] > 0:
            parts.append(segment)
    if not parts:
        raise ValueError(f"segments has no keys in {len(segments)} segments; attention needs at least one key")
    if len(parts) == 1 and not return_lse:
        return tile_attention(q, *parts[0], scale=scale, backend=backend)
    out, lse = tile_attention(q, *parts[0], scale=scale, return_lse=True, backend=backend)
    for k, v in parts[1:]:
        out, lse = merge_attention(
            out, lse, *tile_attention(q, k, v, scale=scale, return_lse=True, backend=backend), backend=backend
        )
    return (out, lse) if return_lse else out
