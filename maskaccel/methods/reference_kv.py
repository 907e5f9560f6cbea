"""Keys and values of reference images, computed once (as the pipelines of FLUX.2 and FLUX.1 Kontext allow).

Editing models take the tokens of reference images behind those of the latents. They are the same at every step but for
the modulation by the timestep, and what the model gives for them is thrown away. So they are computed at dense steps
alone (the first one, and every `refresh`-th); at the others the queries of text and latents attend to their keys and
values as the last dense step left them, a segment of their own behind those that the step computes. Only the rows of
the reference are kept.

Every latent token is computed at every step, so this goes with any solver. It trades the timestep that the reference
tokens are modulated by, which is that of the last dense step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..masks import Schedule, TokenIndex
from ..ops import segment_attention
from ..ops._checks import count as check_count
from ..patching.active_attention import ActiveAttention, Detail
from ..patching.attention import AttentionCall
from ..patching.partial import attach_active
from ..patching.patch import Context
from ..patching.selector import Selector
from ..state.kv import KVStorage
from ._active import PartialSteps, check_common

_NEVER = 1 << 20  # more steps than any run has


@dataclass(frozen=True)
class ReferenceKV(PartialSteps):
    """Compute the tokens of reference images at dense steps alone.

    Attributes:
        refresh: Every so-many-th step is dense; None: the first one alone.
        tokens: Number of latent tokens, where the call of the model does not tell them from the reference's (by
            `img_ids` or `img_shapes`).
        storage: How keys and values are kept.
    """

    refresh: int | None = None
    tokens: int | None = None
    storage: KVStorage = KVStorage()

    name = "ReferenceKV"
    paper = "FLUX.1 Kontext (arXiv 2506.15742), whose models it is for"
    models = "models that take reference tokens behind the latents: FLUX.1 Kontext, FLUX.2, Qwen-Image-Edit"
    multiple = 1

    def __post_init__(self) -> None:
        check_common(self)
        if self.refresh is not None:
            check_count("refresh", self.refresh, 2)
        if self.tokens is not None:
            check_count("tokens", self.tokens, 1)

    @property
    def rule(self) -> Schedule:
        """The step mask."""
        return Schedule(_NEVER if self.refresh is None else self.refresh, between=("partial",))

    def selector(self) -> Selector:
        """How tokens are chosen on one model."""
        return _Latents(self)

    def attach(self, context: Context) -> None:
        """Plan the span of all blocks and the cache of every attention.

        Raises:
            PatchError: The model's blocks cannot run on some of the tokens.
        """
        attach_active(context, self.name, self.rule, self.selector(), self.storage, attention=_ReferenceAttention)


class _Latents(Selector):
    """The tokens of the latents, which stand before those of the reference."""

    stale = False
    static = True

    def __init__(self, method: ReferenceKV) -> None:
        self.method = method
        self.tokens = method.tokens
        self._ids: Tensor | None = None  # what the number was read from

    def begin(self, named: dict[str, Any]) -> None:
        """Read from a call how many tokens are those of the latents; waits for the device once for each positions."""
        if self.method.tokens is not None:
            return
        ids, shapes = named.get("img_ids"), named.get("img_shapes")
        if isinstance(ids, Tensor):
            if ids is not self._ids:
                first = (ids[0] if ids.dim() == 3 else ids)[:, 0]
                self._ids, self.tokens = ids, int((first == first[0]).sum())
        elif shapes:
            sizes = shapes[0] if isinstance(shapes[0], list) else [shapes[0]]
            frames, height, width = sizes[0]
            self.tokens = frames * height * width

    def fixed(self, grid: tuple[int, ...], tokens: int, device: torch.device) -> TokenIndex | None:
        """The latent tokens of every step in part."""
        if self.tokens is None or self.tokens >= tokens:
            return None
        ids = torch.arange(tokens, dtype=torch.int32, device=device)[None]
        return TokenIndex(ids[:, : self.tokens], ids.where(ids < self.tokens, -1))


class _ReferenceAttention(ActiveAttention):
    """Attention over the keys and values of a step and, as a further segment, those of the reference."""

    def _places(self, rows: int) -> tuple[slice, list[slice]]:
        """Where the reference is in a joint sequence of so many rows, and what is beside it."""
        run = self.run
        assert isinstance(run.selector, _Latents)
        latents, tokens = run.selector.tokens or run.tokens, run.tokens
        first = rows - tokens if run.layout.tokens.text == "first" else 0
        start, end = first + latents, first + tokens
        return slice(start, end), [slice(0, start), slice(end, rows)]

    def fill(self, call: AttentionCall, key: tuple[int, int], index: TokenIndex | None) -> None:
        """Keep the rows of the reference."""
        run, (place, _) = self.run, self._places(call.k.shape[1])
        if place.start == place.stop:
            return
        run.details[run.branch, key] = Detail(call.mask, True)
        run.kv.fill(run.branch, key, call.k[:, place], call.v[:, place])

    def attend(self, call: AttentionCall, key: tuple[int, int], index: TokenIndex | None) -> Tensor | None:
        """Attend to both segments."""
        run = self.run
        kept = run.kv.length(run.branch, key)
        if kept is None or index is None:
            return None
        k, v = run.kv.read(run.branch, key, call.k)
        mask = run.details[run.branch, key].mask
        if mask is None and call.refusal() is None:
            out = segment_attention(call.q, [(call.k, call.v), (k, v)], scale=call.scale)
            assert isinstance(out, Tensor)
            return out
        place, beside = self._places(call.k.shape[1] + kept)
        if isinstance(mask, Tensor):
            rows = call.k.shape[1] + kept
            if mask.dim() > 1 and mask.shape[-2] == rows:
                mask = torch.cat([mask[..., part, :] for part in beside], -2)
            if mask.shape[-1] == rows:
                mask = torch.cat([mask[..., part] for part in (*beside, place)], -1)
        return call.dense(k=torch.cat([call.k, k], 1), v=torch.cat([call.v, v], 1), mask=mask)
