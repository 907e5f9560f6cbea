"""The oracle of token dropping: the span on all tokens, with dropped keys hidden and dropped rows put back."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskaccel.masks import TokenIndex
from maskaccel.models import stack_of, streams_of
from maskaccel.patching.attention import AttentionCall, attention_sites, bridge, layout_of
from maskaccel.patching.span import SpanCall, attach_span, span_activity

Choose = Callable[[int, int, Any], TokenIndex]


def different(batch: int, tokens: int, device: Any = None) -> TokenIndex:
    """About two thirds of the tokens, others in each sample."""
    noise = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(tokens + batch))
    keep = noise.argsort(1)[:, : max(1, (2 * tokens + 2) // 3 - 1)].sort(1).values
    return TokenIndex.from_keep(keep, tokens)


def alike(batch: int, tokens: int, device: Any = None) -> TokenIndex:
    """About two thirds of the tokens, the same in all samples."""
    return different(1, tokens)


class SpanOf:
    """Routes a span around its dropped tokens."""

    kind, models, name = "research", "any", "SpanOf"

    def __init__(self, start: int = 0, end: int = -1, choose: Choose | None = different) -> None:
        self.start, self.end, self.tokens = start, end, choose
        self.seen: list[tuple[int, int, int | None, bool]] = []  # samples, tokens, text, whether blocks hand all on

    def attach(self, context: Any) -> None:
        attach_span(context, self.name, self.start, self.end, self)

    def choose(self, call: SpanCall) -> TokenIndex | None:
        self.seen.append((call.batch, call.tokens, call.text, call.spread))
        return None if self.tokens is None else self.tokens(call.batch, call.tokens, None)

    def reenter(self, call: SpanCall, rows: Tensor) -> Tensor:
        return call.restored(rows)

    def activity(self, model: nn.Module) -> dict[str, Any]:
        return span_activity(model)


class MaskedDense:
    """The same with all tokens in every block: their keys are hidden, and what becomes of them is forgotten.

    It knows nothing of how a span is run: where the latent tokens are, it takes from the bridge of attention.
    """

    kind, models, name = "oracle", "any", "MaskedDense"

    def __init__(self, start: int = 0, end: int = -1, choose: Choose = different) -> None:
        self.start, self.end, self.tokens = start, end, choose
        self.index: TokenIndex | None = None
        self.masked = 0

    def attach(self, context: Any) -> None:
        blocks = [block for segment in stack_of(context.model).segments for block in segment]
        first, last = self.start % len(blocks), self.end % len(blocks)
        self.layout = layout_of(context)
        for site in attention_sites(context, self.name, ("self", "joint", "cross", "other")):
            bridge(context, self.name, site, self.attention)
        context.transaction.pre_hook(context.model, self.layout.read)
        for number in range(first, last + 1):
            context.transaction.wrap_forward(blocks[number], _Block(self, number == first, number == last))
            context.done(self.name, blocks[number], "with dropped keys hidden")

    def attention(self, call: AttentionCall) -> Tensor | None:
        index, keys = self.index, call.k.shape[1]
        if index is None:
            return None
        beside = keys - index.n
        text = (0, 0) if beside == 0 else (call.text or (0, 0))
        of_latents = call.site.kind in ("self", "joint") or re.search(r"video_to_audio|av_cross", call.site.name)
        if beside != text[1] or not of_latents or (beside and call.site.kind != "joint"):
            return None
        kept = index.mask
        if call.k.shape[0] != kept.shape[0]:  # Mochi attends to each sample by itself
            kept = kept[call.part][None]
        seen = kept.new_ones(kept.shape[0], beside)
        kept = torch.cat([seen, kept] if beside and text[0] == 0 else [kept, seen], 1)[:, None, None]
        mask = torch.where(kept, 0.0, -torch.inf).to(call.q.dtype)
        bias = call.bias()
        self.masked += 1
        q, k, v = (t.transpose(1, 2) for t in (call.q, call.k, call.v))
        mask = mask if bias is None else mask + bias
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=call.scale, enable_gqa=call.enable_gqa)
        return out.transpose(1, 2)

    def activity(self, model: nn.Module) -> dict[str, Any]:
        return {}


class _Block:
    def __init__(self, oracle: MaskedDense, first: bool, last: bool) -> None:
        self.oracle, self.first, self.last = oracle, first, last

    def __call__(self, block: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        oracle, streams = self.oracle, streams_of(block)
        hidden = streams.take(args, kwargs)[0]
        assert hidden is not None
        if self.first:
            grid = oracle.layout.grid
            count = hidden.shape[1] if grid is None else int(torch.tensor(grid).prod())
            oracle.index = oracle.tokens(hidden.shape[0], count, None).expand(hidden.shape[0])
            oracle.stash = self.latents(hidden)
        output = inner(*args, **kwargs)
        if not self.last:
            return output
        found, index = list(streams.read(output)), oracle.index
        first = found[0]
        assert first is not None
        assert index is not None
        latents = torch.where(index.mask[..., None], self.latents(first), oracle.stash)
        beside = first.shape[1] - index.n
        text_first = oracle.layout.tokens.text == "first"
        parts = [first[:, :beside], latents] if text_first else [latents, first[:, index.n :]]
        found[0] = torch.cat(parts, 1)
        oracle.index = None
        return streams.give(found)

    def latents(self, x: Tensor) -> Tensor:
        assert self.oracle.index is not None
        n = self.oracle.index.n
        return x[:, -n:] if self.oracle.layout.tokens.text == "first" else x[:, :n]
