"""Fast-dLLM: cached keys and values for masked language models (Wu et al. 2025, arXiv 2505.22618; the authors' code).

A masked language model attends in both directions, so each token that is revealed changes the keys and values of all
others. Between two steps they change little: while a block is decoded the model is called with the rows of the block
alone, which attend to what the last whole call left of all other tokens. dLLM-Cache (Liu et al. 2025, arXiv
2506.06295) refreshes the prompt seldom and the answer often.

Here the rows of the block are written in place over those that are kept (the authors' code joins them, or looks their
places up in every layer), keys are kept after the rotary embedding, and the head is not run on other rows where the
model lets one choose. Where the model's mask hides later blocks (LLaDA2), what is before a block does not depend on it,
and caching is exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..models._tokens import parameters
from ..ops._checks import choice
from ..ops._checks import count as check_count
from ..patching.attention import AttentionCall, AttentionSite, attention_sites, bridge
from ..patching.patch import Context
from ..patching.transaction import PatchError
from ..state.generation import Generation
from ..state.kv import KVRows, KVStorage
from ._masked import ROWS, Model, logits_of

_CACHES = ("dual", "prefix", "causal")
_HEAD_ROWS = "logits_to_keep"  # argument of transformers' models: the rows that the head is run on
_PAST = ("past_key_values", "past_key_value", "inputs_embeds")

Span = tuple[int, int]


@dataclass(frozen=True)
class FastDLLM:
    """Keys and values of the tokens around a block, kept while a sampler decodes the block.

    As a patch of a language model that is given token ids, and computes attention by torch's
    `scaled_dot_product_attention`; a sampler is told of it by `cache=model`. Calls by anybody else stay as they are.

    Attributes:
        cache: `"dual"`: what is before and after the block is kept. `"prefix"`: what is before it; rows after it are
            computed with it. `"causal"`: for models whose mask hides later blocks; a finished block is computed once
            more together with the first step of the next one, which makes it exact.
        refresh: Steps from one whole call to the next within a block; None: one at the start of each block (with
            `"causal"`, of the run).
        prompt_refresh: Steps from one whole call to the next; calls between them that would be whole leave out what is
            before the first masked token (dLLM-Cache). None: no call leaves it out.
        block: With `"causal"`: tokens of a block of the model's mask. The sampler's blocks have to end where such end.
        positions: Name of the model's argument with the place of each token. Where a call does not give it, places are
            counted from 0.
        storage: How keys and values are kept; all layers keep them.
    """

    cache: Literal["dual", "prefix", "causal"] = "dual"
    refresh: int | None = None
    prompt_refresh: int | None = None
    block: int | None = None
    positions: str = "position_ids"
    storage: KVStorage = KVStorage()

    kind = "lossy"
    name = "FastDLLM"
    paper = "Fast-dLLM: Training-free Acceleration of Diffusion LLM by Enabling KV Cache (arXiv 2505.22618)"
    models = "language models that take position_ids, with attention by torch; also those of transformers"

    def __post_init__(self) -> None:
        choice("cache", self.cache, _CACHES)
        for name in ("refresh", "prompt_refresh", "block"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)
        if (self.block is not None) != (self.cache == "causal"):
            raise ValueError(
                f"cache={self.cache!r}, block={self.block}: block is given with cache='causal', and only then"
            )
        if self.prompt_refresh is not None and self.cache == "causal":
            raise ValueError("prompt_refresh is given with cache='causal', where the prompt does not change")
        if not isinstance(self.positions, str):
            raise TypeError(f"positions={self.positions!r} must be the name of an argument of the model")
        if not isinstance(self.storage, KVStorage):
            raise TypeError(f"storage={self.storage!r} must be a KVStorage")
        if self.storage.layers is not None:
            raise ValueError(f"storage has layers={self.storage.layers}; every layer has to see all tokens")

    def attach(self, context: Context) -> None:
        """Plan the caches of one model.

        Raises:
            PatchError: The model cannot be told the places of tokens, or some attention of it cannot be reached.
        """
        model, names = context.model, parameters(context.model)
        if self.positions not in names:
            raise PatchError(
                f"{self.name}: {type(model).__name__}.forward has no argument {self.positions!r}, so it would count "
                "the places of a block's tokens from 0; name the argument that says them by positions="
            )
        sites = attention_sites(context, self.name, ("self", "joint", "other"))
        missed = {f"{c}: {why}" for method, c, why in context.report.skipped if method == self.name}
        missed |= {why for site in sites if (why := _other_attention(site)) is not None}
        if missed or not sites:
            why = "; ".join(sorted(missed)) or "it has none that is computed by scaled_dot_product_attention"
            raise PatchError(f"{self.name}: attention of {type(model).__name__} cannot be reached: {why}")
        context.track_generation(self.name)
        rows = CachedRows(self, context.generation, names, sites)
        for number, site in enumerate(sites):
            bridge(context, self.name, site, CachedAttention(rows, number))
        context.transaction.set(model, ROWS, rows, self.name)
        context.transaction.wrap_forward(model, rows)

    def activity(self, model: nn.Module) -> dict[str, Any]:
        """What the calls of a sampler were."""
        rows: CachedRows | None = model.__dict__.get(ROWS)
        return {} if rows is None else rows.activity()


def _other_attention(site: AttentionSite) -> str | None:
    """Why an attention that leads to torch's function will call another one."""
    chosen = getattr(getattr(site.module, "config", None), "_attn_implementation", "sdpa")
    if chosen in (None, "sdpa"):
        return None
    return f"{site.name} has attn_implementation={chosen!r}; load the model with 'sdpa'"


@dataclass(frozen=True)
class _Whole:
    """What a whole call of an attention said, and calls in part no longer say.

    Attributes:
        mask: The model's mask over all rows.
        heads: Heads of the keys: models repeat them for some masks.
    """

    mask: Tensor | None
    heads: int

    def heads_of(self, t: Tensor) -> Tensor:
        """Keys or values `(B, M, Hk, D)` of a call in part with as many heads."""
        times = self.heads // t.shape[2]
        return t if times <= 1 else t.repeat_interleave(times, 2)


class CachedRows:
    """The keys and values of one model, and which rows of it a call computes: a wrapper of its forward.

    Attributes:
        kv: Keys and values of all rows, by the number of the call within its step.
        rows: First row that the call at hand computes, and the one after the last; None: not a sampler's call.
    """

    def __init__(self, recipe: FastDLLM, generation: Generation, names: tuple[str, ...],
                 sites: list[AttentionSite]) -> None:  # fmt: skip
        self.recipe, self.generation, self.names = recipe, generation, names
        self.sites = [site.name for site in sites]
        self.kv = KVRows(generation, recipe.storage, len(sites))
        self.rows: Span | None = None
        self.computed = self.partial = self.computed_rows = self.all_rows = 0
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": None, "_whole": {}, "_before": None}

    def _reset(self) -> None:
        self.rows = None
        self._before: Span | None = None  # the span of the step before
        self._whole: dict[tuple[str, tuple[int, int]], _Whole] = {}
        self._filled: set[tuple[int, int]] = set()
        self._calls = self._age = self._prompt_age = self._start = self._n = 0
        self._span: Span = (0, 0)  # the rows that the sampler asked for, and those that the output has
        self._given: Span = (0, 0)
        self._ids: Tensor | None = None

    def activity(self) -> dict[str, Any]:
        """For the report."""
        found: dict[str, Any] = {"computed": self.computed, "in part": self.partial}
        if self.all_rows:
            found["share of rows in part"] = round(self.computed_rows / self.all_rows, 4)
        return found | {"bytes held": self.kv.nbytes, "peak bytes": self.generation.peak_bytes}

    # ---------------------------------------------------------------------------------------------- what samplers call
    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """One run of a sampler; what was kept is freed at its end."""
        self._reset()
        self.generation.begin()
        try:
            yield
        finally:
            self.generation.end()
            self._reset()

    def call(self, model: Model, tokens: Tensor, span: Span) -> Tensor:
        """What a model gives for the rows of a span; see `ComputedRows`."""
        n, recipe = tokens.shape[1], self.recipe
        if recipe.block is not None and (span[0] % recipe.block or (span[1] % recipe.block and span[1] != n)):
            raise ValueError(
                f"{recipe.name}: the sampler's block is tokens {span[0]} to {span[1] - 1} of {n}; with "
                f"block={recipe.block} it must begin and end with blocks of the mask: pad the prompt, or give the "
                "sampler another block"
            )
        rows, refreshed = self._choose(span, n)
        self.rows, self._span, self._n, self._calls = rows, span, n, 0
        try:
            output = logits_of(model(tokens))
        finally:
            self.rows = None
        if not self._calls:
            raise ValueError(f"{recipe.name}: the sampler's model never called the one that is given as cache")
        whole = rows == (0, n)
        self._age = 1 if refreshed else self._age + 1
        self._prompt_age = 1 if whole else self._prompt_age + 1
        self._before = span
        self.generation.step()
        first, last = self._given
        if output.shape[1] != last - first:
            raise ValueError(
                f"{recipe.name}: the model gave {output.shape[1]} rows for tokens {first} to {last - 1}; it must give "
                "one for each"
            )
        return output[:, span[0] - first : span[1] - first]

    def _choose(self, span: Span, n: int) -> tuple[Span, bool]:
        """The rows that a call computes, and whether that is all of them, or all but the prompt."""
        recipe, before = self.recipe, self._before
        if before is None:
            self._start = span[0]
            return (0, n), True
        due = recipe.refresh is not None and self._age >= recipe.refresh
        if recipe.cache == "causal":
            if due:
                return (0, n), True
            # What the last step of a finished block revealed is not in its keys yet.
            first, last = min(before[0], span[0]), span[1]
        elif due or before != span:
            seldom = recipe.prompt_refresh is not None and self._prompt_age < recipe.prompt_refresh
            return (self._start if seldom else 0, n), True
        else:
            first, last = span[0], span[1] if recipe.cache == "dual" else n
        if last - first == 1 and n > 1:
            # Code of models takes a single query for decoding; a row more is fresh at next to no cost.
            first, last = (first - 1, last) if first else (first, last + 1)
        return (first, last), False

    # ---------------------------------------------------------------------------------------------- a call of the model
    def __call__(self, model: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """One call of the model, as a wrapper of its forward."""
        if self.rows is None:
            return inner(*args, **kwargs)
        named = dict(zip(self.names, args, strict=False)) | kwargs
        self._check(model, named)
        whole, branch = self.rows == (0, self._n), str(self._calls)
        if not whole and not self.kv.complete(branch):
            raise ValueError(
                f"{self.recipe.name}: this step calls the model more often than the last whole one, {self._calls} times"
            )
        self._calls += 1
        self._given = self.rows
        if "use_cache" in self.names:
            named.setdefault("use_cache", False)  # which would copy keys and values once more
        if whole:
            self.kv.begin(branch)
            self._filled.clear()
        else:
            named = self._cut(named)
        if _HEAD_ROWS in self.names and _HEAD_ROWS not in named:
            first = self.rows[0]
            named[_HEAD_ROWS] = torch.arange(self._span[0] - first, self._span[1] - first, device=self._device)
            self._given = self._span
        output = inner(**named)
        if whole:
            self._check_filled()
            self.kv.end(branch)
        self._count(whole)
        return output

    def _count(self, whole: bool) -> None:
        assert self.rows is not None
        if whole:
            self.computed += 1
            return
        self.partial += 1
        self.computed_rows += self.rows[1] - self.rows[0]
        self.all_rows += self._n

    def _check(self, model: nn.Module, named: dict[str, Any]) -> None:
        """ValueError if a call is not one of all token ids."""
        ids = named.get(self.names[0])
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != self._n or ids.is_floating_point():
            found = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(
                f"{self.recipe.name}: {type(model).__name__} is called with {self.names[0]} of {found}; with a cache "
                f"it must be given all token ids, (B, {self._n})"
            )
        given = [name for name in _PAST if named.get(name) is not None]
        if given:
            raise ValueError(
                f"{self.recipe.name}: {given[0]} is given, but the patch keeps the keys and values; leave it out"
            )
        self._device = ids.device

    def _cut(self, named: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call cut to the rows that it computes."""
        assert self.rows is not None
        (first, last), n = self.rows, self._n
        places = named.pop(self.recipe.positions, None)
        own = torch.arange(first, last, device=self._device)
        self._ids = own[None].int()

        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[-1] != n:
                return value
            if value.dim() > 2 and value.shape[-2] not in (1, n):
                return value
            rows = value[..., first:last]  # of a mask: what stays hidden is known from the whole call
            return rows[..., first:last, :] if value.dim() > 2 and value.shape[-2] == n else rows

        named = {name: pytree.tree_map(cut, value) for name, value in named.items()}
        named[self.recipe.positions] = own[None] if places is None else places[..., first:last]
        return named

    def _check_filled(self) -> None:
        """ValueError if some attention was not seen in a whole call."""
        seen = {number for number, _ in self._filled}
        missed = [name for number, name in enumerate(self.sites) if number not in seen]
        if missed:
            raise ValueError(
                f"{self.recipe.name}: {', '.join(missed)} did not call scaled_dot_product_attention in a whole call, "
                "so it cannot be given kept keys and values"
            )

    # ------------------------------------------------------------------------------------------------------- attention
    def attend(self, call: AttentionCall, number: int) -> Tensor | None:
        """Attend to all rows; None: as the model does."""
        if self.rows is None:
            return None
        branch, key = str(self._calls - 1), (number, call.part)
        if self.rows == (0, self._n):
            self._fill(call, branch, key)
            return None
        assert self._ids is not None
        if key not in self._filled or call.k.shape[1] != self._ids.shape[1]:
            raise ValueError(
                f"{self.recipe.name}: {self.sites[number]} has {call.k.shape[1]} keys in a call of "
                f"{self._ids.shape[1]} tokens, or is not called in whole calls"
            )
        whole, last = self._whole[branch, key], self.rows[1]
        own_k, own_v = (whole.heads_of(t) for t in (call.k, call.v))
        k, v = self.kv.renew(branch, key, own_k, own_v, self._ids)
        mask = whole.mask
        if mask is not None and mask.shape[-2] == self._n:
            mask = mask[..., self.rows[0] : last, :]
        if self.recipe.cache == "causal":  # nothing after the block is seen
            k, v, mask = k[:, :last], v[:, :last], None if mask is None else mask[..., :last]
        # Models may take a call in which nothing is hidden for a causal one; the whole call was not.
        return call.dense(k=k, v=v, mask=mask, is_causal=False)

    def _fill(self, call: AttentionCall, branch: str, key: tuple[int, int]) -> None:
        name, site = self.recipe.name, self.sites[key[0]]
        if call.is_causal:
            raise ValueError(
                f"{name}: {site} is causal (is_causal=True); a masked model sees all tokens, or has a mask"
            )
        if key in self._filled:
            raise ValueError(f"{name}: {site} is called several times in one call of the model")
        if call.q.shape[1] != self._n or call.k.shape[1] != self._n:
            raise ValueError(
                f"{name}: {site} has {call.q.shape[1]} queries and {call.k.shape[1]} keys in a call of {self._n} tokens"
            )
        mask = call.mask
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() < 2 or mask.shape[-1] != self._n):
            found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{name}: the mask of {site} is {found}; only a tensor with {self._n} columns can be cut")
        if self.recipe.block is not None and not any(mask is known.mask for known in self._whole.values()):
            self._check_causal(mask, site, self.recipe.block)
        self._whole[branch, key] = _Whole(mask, call.k.shape[2])
        self._filled.add(key)
        self.kv.fill(branch, key, call.k, call.v)

    def _check_causal(self, mask: Tensor | None, site: str, block: int) -> None:
        """ValueError if a mask does not hide later blocks; one read of the device for each mask of a run."""
        hidden = False
        if mask is not None:
            later = torch.arange(self._n, device=mask.device) // block
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            hidden = not bool((seen & (later > later[:, None])).any())
        if not hidden:
            raise ValueError(
                f"{self.recipe.name}: {site} sees later blocks of {block} tokens; with cache='causal' its mask must "
                "hide them (give the model its attention_mask), else use 'dual' or 'prefix'"
            )


class CachedAttention:
    """The attention of one site."""

    def __init__(self, rows: CachedRows, number: int) -> None:
        self.rows, self.number = rows, number

    def __call__(self, call: AttentionCall) -> Tensor | None:
        """Attend."""
        return self.rows.attend(call, self.number)


# It decides and remembers in Python at every step: in a graph each step would be a constant, and compiled anew.
CachedAttention.__call__._torchdynamo_disable = True  # type: ignore[attr-defined]
