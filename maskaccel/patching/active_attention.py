"""Attention of active tokens over the keys and values of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..masks import TokenIndex
from ..ops import tile_attention, write_kv_rows
from .attention import AttentionCall, AttentionSite

if TYPE_CHECKING:
    from .partial import ActiveTokens

FILL, PARTIAL, CLEAN = "fill", "partial", "clean"


@dataclass(frozen=True)
class Detail:
    """What a dense call of an attention said, and calls in part no longer say.

    Attributes:
        mask: The model's mask over all rows.
        text_first: Whether the rows beside the latents come before them.
    """

    mask: Any
    text_first: bool


class ActiveAttention:
    """The attention of one site: as the model has it at dense steps, over cached keys and values at steps in part."""

    def __init__(self, run: ActiveTokens, site: AttentionSite, number: int) -> None:
        self.run, self.site, self.number = run, site, number

    def __call__(self, call: AttentionCall) -> Tensor | None:
        """Attend."""
        run = self.run
        if run.mode is None:
            return None
        key, index = (self.number, call.part), run.entered
        if run.mode != PARTIAL:
            self.fill(call, key, index)
            return None
        return self.attend(call, key, index)

    def attend(self, call: AttentionCall, key: tuple[int, int], index: TokenIndex | None) -> Tensor | None:
        """Attend at a step in part."""
        run = self.run
        rows = run.kv.length(run.branch, key)
        if rows is None or index is None:
            return None
        detail = run.details[run.branch, key]
        sample = run.layout.sample
        if sample is not None:
            index = index.part(slice(sample, sample + 1))
        ids = row_ids(index, rows - index.n, detail.text_first)
        if ids.shape[1] != call.k.shape[1]:
            raise ValueError(
                f"{run.method}: {self.site.name} has {call.k.shape[1]} rows at a step in part; {index.kept} active "
                f"tokens and {rows - index.n} beside them were expected"
            )
        k, v = run.kv.renew(run.branch, key, call.k, call.v, ids, sample)
        if run.beside is not None:
            other_k, other_v = run.beside.read(run.branch, key, k, sample)
            k, v = torch.lerp(other_k, k, run.share), torch.lerp(other_v, v, run.share)
            write_kv_rows(call.k, call.v, k, v, ids)
        call.mask = _mask_rows(detail.mask, ids, rows)
        if run.kernel and call.refusal() is None:
            return tile_attention(call.q, k, v, scale=call.scale, bias=call.bias())
        return call.dense(k=k, v=v, mask=call.mask)

    def fill(self, call: AttentionCall, key: tuple[int, int], index: TokenIndex | None) -> None:
        """Keep the keys and values of a call, of all tokens, or of the others where only those are called."""
        run = self.run
        kept = run.beside if run.mode == CLEAN and run.beside is not None else run.kv
        text_first = run.layout.tokens.text == "first"
        if kept is run.kv:
            run.details[run.branch, key] = Detail(call.mask, text_first)
        if index is None:
            kept.fill(run.branch, key, call.k, call.v)
            return
        if call.mask is not None:
            raise ValueError(f"{run.method}: {self.site.name} masks its keys, so the reference cannot be called alone")
        beside, batch = call.k.shape[1] - index.kept, call.k.shape[0]
        sample = run.layout.sample
        if sample is not None:
            batch, index = index.batch, index.part(slice(sample, sample + 1))
        if not sample:
            kept.prepare(run.branch, key, call.k, batch, index.n + beside)
        kept.write(run.branch, key, call.k, call.v, row_ids(index, beside, text_first), sample)


# It decides and remembers in Python at every step: in a graph each step would be a constant, and compiled anew.
ActiveAttention.__call__._torchdynamo_disable = True  # type: ignore[attr-defined]


def row_ids(index: TokenIndex, beside: int, first: bool) -> Tensor:
    """int32 `(B|1, K + beside)`: the active rows of a joint sequence; slots without a token are out of range."""
    if not beside:
        return index.keep
    total = index.n + beside
    own = index.keep.where(index.keep < index.n, total - (beside if first else 0))
    start = 0 if first else index.n
    other = torch.arange(start, start + beside, dtype=torch.int32, device=own.device).expand(own.shape[0], -1)
    return torch.cat([other, own + beside] if first else [own, other], 1)


def _mask_rows(mask: Any, ids: Tensor, rows: int) -> Any:
    """A mask over all queries cut to those of the active rows."""
    if not isinstance(mask, Tensor) or mask.dim() < 2 or mask.shape[-2] != rows:
        return mask
    at = ids.long().clamp(max=rows - 1)
    if at.shape[0] == 1:
        return mask.index_select(-2, at[0])
    mask = mask[(None,) * (4 - mask.dim())]
    at = at[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    return mask.expand(at.shape[0], -1, -1, -1).gather(2, at)
