"""Scores of tokens from the attention that a module computes, for methods that choose tokens.

The scores are taken from the queries, keys and values as they enter `scaled_dot_product_attention`, after norms and
rotary embedding, whatever processor the module has. So they need attention that goes through that function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..patching.transaction import Transaction
from .generation import Generation

WATCH = "_maskaccel_attention_scores"

_CHUNK = 1 << 24  # elements of an attention map that are held at once

Measure = Callable[[Tensor, Tensor, Tensor, "Tensor | None", "float | None"], Tensor]


def received(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention that each key token receives, summed over queries, mean over heads (ToCa's s1): `(B, keys)`."""
    total = q.new_zeros(q.shape[0], k.shape[2], dtype=torch.float32)
    for weights in _maps(q, k, mask, scale):
        total += weights.sum(1)
    return total


def entropy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """1 + the entropy of what each query token attends to, mean over heads (ToCa's s2): `(B, queries)`."""
    parts = [1 - (weights * (weights + 1e-7).log()).sum(-1) for weights in _maps(q, k, mask, scale)]
    return torch.cat(parts, dim=1)


def small_values(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """1 - the norm of each token's value vector, summed over heads (the authors' `kv-norm`): `(B, keys)`."""
    return (1 - v.float().norm(dim=-1)).sum(1)


def _maps(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> Any:
    """The attention map, mean over heads, some queries at a time: fp32 `(B, some queries, keys)`."""
    batch, heads, queries, width = q.shape
    if k.shape[1] != heads:
        k = k.repeat_interleave(heads // k.shape[1], dim=1)
    scale = width**-0.5 if scale is None else scale
    some = max(1, _CHUNK // (batch * heads * k.shape[2]))
    for start in range(0, queries, some):
        logits = (q[:, :, start : start + some] @ k.transpose(-2, -1)).float() * scale
        if mask is not None:
            part = mask[..., start : start + some, :] if mask.shape[-2] == queries else mask
            logits = logits.masked_fill(~part, -torch.inf) if part.dtype is torch.bool else logits + part
        yield logits.softmax(-1).nan_to_num_(0.0).mean(1)


class _Intercept(TorchFunctionMode):
    """Measures the attention that is computed inside."""

    def __init__(self, measure: Measure) -> None:
        super().__init__()
        self.measure = measure
        self.found: list[Tensor | None] = []

    def scores(self, batch: int) -> Tensor | None:
        """Of calls for single samples, one for each, all of them; else of the last call."""
        shapes = {None if f is None else tuple(f.shape) for f in self.found}
        if batch > 1 and len(self.found) == batch and len(shapes) == 1 and (shapes.pop() or (0,))[0] == 1:
            return torch.cat([f for f in self.found if f is not None])
        return self.found[-1] if self.found else None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.found.append(self._measured(*args, **kwargs))
        return func(*args, **kwargs)

    def _measured(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        return None if query.dim() != 4 or is_causal else self.measure(query, key, value, attn_mask, scale)


class AttentionScores:
    """Scores from one attention module, of the last step at which it was computed; for each guidance branch.

    Attributes:
        measure: What is measured.
        rows: While the module is called with some of its tokens: int64 `(B, M)`, which ones; else None.
    """

    def __init__(self, generation: Generation, measure: Measure) -> None:
        self.generation, self.measure = generation, measure
        self.rows: Tensor | None = None
        self._held: dict[str, Tensor] = {}
        generation.memories.append(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": {}, "rows": None}

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(t.nbytes for t in self._held.values())

    def clear(self) -> None:
        """Forget every branch."""
        self._held.clear()

    def get(self) -> Tensor | None:
        """The scores of this branch, fp32 `(B, tokens)`."""
        return self._held.get(self.generation.branch_key)

    def call(self, inner: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module's call, measured."""
        if not self.generation.active or torch.is_grad_enabled():
            return inner(*args, **kwargs)
        with _Intercept(self.measure) as seen:
            output = inner(*args, **kwargs)
        x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        branch, found = self.generation.branch_key, seen.scores(x.shape[0])
        if found is not None and self.rows is not None:
            found = self._held[branch].scatter(1, self.rows, found)
        if found is None:
            self._held.pop(branch, None)
        else:
            self._held[branch] = found
        return output

    def attach(self, module: nn.Module, transaction: Transaction, claimant: str) -> None:
        """Plan that `module` is measured whenever it is computed."""
        transaction.set(module, WATCH, self, claimant)
        transaction.wrap_forward(module, _watched_forward)


def _watched_forward(self: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return self.__dict__[WATCH].call(inner, args, kwargs)
