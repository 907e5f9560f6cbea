"""What methods of sparse attention share: which sites they take, when they stay dense, and what the report says."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import TileMask, TokenOrder
from ..ops import tile_attention
from ..patching.attention import AttentionCall, AttentionSite, Once, Places, attention_sites, bridge
from ..patching.order import order_stack, ordered_calls
from ..patching.patch import Context
from ..patching.transaction import PatchError
from ..state.generation import Generation

_UNLIKE = "queries and keys are not the same tokens"

POLICY = "_maskaccel_attention_policy"


class SparseAttention:
    """Base of the methods that leave attention tiles out: all are lossy, and report alike.

    The base is no dataclass and has no fields; a method is a frozen dataclass of its own that gives `policy`.

    Attributes:
        kinds: The kinds of attention that it takes over.
    """

    kind = "lossy"
    kinds: tuple[Any, ...] = ("self", "joint")
    name = ""
    models = "any model with softmax attention through torch or diffusers' dispatch"
    grid: tuple[int, ...] | None = None

    def policy(self, site: AttentionSite, generation: Generation) -> SitePolicy:
        """What is called in place of the attention of a site."""
        raise NotImplementedError

    def leaves(self, site: AttentionSite) -> str | None:
        """Why a site stays as it is, or None; the first `dense_layers` do, where a method has such a setting."""
        dense = getattr(self, "dense_layers", 0)
        return f"layer {site.layer} of dense_layers={dense}" if site.layer < dense else None

    @property
    def follows_steps(self) -> bool:
        """Whether it does not do the same at every step of a run."""
        return getattr(self, "dense_steps", 0) > 0

    def patch_for(self, grid: tuple[int, ...]) -> tuple[int, ...] | None:
        """The patch in whose order the whole model is to run; None: raster order."""
        return None

    def grid_of(self, site: AttentionSite) -> tuple[int, ...] | None:
        """The grid of a site's latent tokens that the user gives; None: the one that the model's call tells."""
        return self.grid

    def attach(self, context: Context) -> None:
        """Plan the bridge of every site."""
        # What follows steps decides in Python, so whole models compile in one graph only without it.
        generation = context.track_generation(self.name) if self.follows_steps else context.generation
        made: dict[Any, Once] = {}
        for site in attention_sites(context, self.name, self.kinds):
            reason = self.leaves(site)
            if reason is not None:
                context.skip(self.name, site.module, reason)
                continue
            policy = self.policy(site, generation)
            if policy.making is not None:
                _check_hashable(policy.method)
                making = functools.partial(policy.making, policy.method)
                policy.made = made.setdefault((policy.making, policy.method), Once(making))
            bridge(context, self.name, site, policy, grid=self.grid_of(site))
            context.transaction.set(site.module, POLICY, policy, self.name)
        if type(self).patch_for is not SparseAttention.patch_for:
            reason = order_stack(context, self.name, self.patch_for, self.grid)
            if reason is not None:
                context.skip(self.name, context.model, f"tokens are put in order in each attention: {reason}")

    def activity(self, model: nn.Module) -> dict[str, Any]:
        """Attention calls, those left dense and why, and the tiles that were computed."""
        found = activity([policy for policy in policies_of(model) if policy.method == self])
        ordered = ordered_calls(model)
        if ordered is not None and ordered.method == self.name:
            found["model calls in order"] = ordered.calls
        return found


class SelectingAttention(SparseAttention):
    """Base of the methods that choose the tiles anew at every call; a method gives `select`."""

    def policy(self, site: AttentionSite, generation: Generation) -> SitePolicy:
        """The attention of one module."""
        return SelectedTiles(self, site, generation)

    def token_order(self, places: Places) -> TokenOrder | str | None:
        """The order of the tokens at these places, None for as they are, or why the call stays dense."""
        return None

    def options(self) -> dict[str, Any]:
        """More arguments of `tile_attention`."""
        return {}

    def select(self, q: Tensor, k: Tensor, beside: TileMask | None) -> TileMask:
        """The mask of these queries and keys, in the order of `token_order`; `beside` are the tiles that hold text."""
        raise NotImplementedError


def _check_hashable(method: Any) -> None:
    """PatchError if a setting of a method is a list, or another thing that cannot be looked up."""
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        try:
            hash(value)
        except TypeError:
            raise PatchError(f"{method.name}: {field.name}={value!r} can be changed; give a tuple") from None


def policies_of(model: nn.Module) -> list[SitePolicy]:
    """The policies of a patched model."""
    return [m.__dict__[POLICY] for m in model.modules() if POLICY in m.__dict__]


def activity(policies: list[SitePolicy]) -> dict[str, Any]:
    """What policies did since the patch."""
    dense: Counter[str] = Counter()
    for policy in policies:
        dense.update(policy.left)
    steps = kept_by_step(policies)
    result: dict[str, Any] = {
        "sparse calls": sum(p.calls for p in policies),
        "dense calls": sum(dense.values()),
        "tiles computed": sum(kept for kept, _ in steps.values()),
        "tiles in all": sum(tiles for _, tiles in steps.values()),
    }
    held = sum(p.nbytes for p in policies)
    peak = sum(p.peak_bytes for p in policies)
    if peak:
        result |= {"bytes held": held, "peak bytes": peak}
    for reason, count in dense.items():
        result[f"dense: {reason}"] = count
    if not result["sparse calls"] and result["dense calls"]:
        result["warning"] = "never left anything out"
    return result


def kept_by_step(policies: list[SitePolicy]) -> dict[int, tuple[int, int]]:
    """For each step of the runs so far the tiles computed and those there are, calls that stayed dense left out."""
    found: dict[int, tuple[int, int]] = {}
    for policy in policies:
        for step, tally in policy.tallies.items():
            kept, tiles = found.get(step, (0, 0))
            found[step] = kept + tally.computed, tiles + tally.tiles
    return dict(sorted(found.items()))


class _Tally:
    """Tiles of the calls at one step; what is on the device stays there until somebody asks."""

    def __init__(self) -> None:
        self.tiles = self.whole = 0
        self.kept: Tensor | None = None

    @property
    def computed(self) -> int:
        return self.whole + (0 if self.kept is None else int(self.kept))


class SitePolicy:
    """Attention of one site over the tiles of a mask. A subclass gives `mask`.

    Attributes:
        method: Whose policy it is.
        site: Of which attention.
        calls: Calls over a mask.
        left: Calls that stayed dense, by reason.
        tallies: Tiles of the calls at each step; those outside of a run are at step 0.
        making: Given the method and `Places`, what calls there need that depends on nothing else; None if nothing.
        made: Gives that for a call; one for all sites of a model.
    """

    making: Callable[[Any, Places], Any] | None = None
    made: Once

    def __init__(self, method: Any, site: AttentionSite, generation: Generation) -> None:
        self.method, self.site, self.generation = method, site, generation
        self.calls, self.left = 0, Counter[str]()
        self.tallies: dict[int, _Tally] = {}
        self.peak_bytes = 0

    def mask(self, call: AttentionCall) -> TileMask | str:
        """The mask of a call, or why it stays dense."""
        raise NotImplementedError

    def __call__(self, call: AttentionCall) -> Tensor | None:
        """Attend."""
        refused = call.refusal()
        mask = refused if refused is not None else self.mask(call)
        if isinstance(mask, str):
            return self.leave(mask)
        self.count(mask, call)
        return tile_attention(call.q, call.k, call.v, mask, scale=call.scale, bias=call.bias())

    def dense_step(self) -> str | None:
        """Why this step stays dense, or None."""
        steps, at = getattr(self.method, "dense_steps", 0), self.generation
        # Without any the step is not looked at: a graph that did would hold for that step alone.
        return "dense_steps" if steps and at.active and at.index < steps else None

    def leave(self, reason: str) -> Tensor | None:
        """Note that a call stays dense; None, as the bridge expects then."""
        if not torch.compiler.is_compiling():
            self.left[reason] += 1
        return None

    def count(self, mask: TileMask | None, call: AttentionCall) -> None:
        """Note the tiles of a call; without waiting for the device."""
        if torch.compiler.is_compiling():
            return
        self.calls += 1
        batch, heads = call.q.shape[0], call.q.shape[2]
        block = getattr(self.method, "block", (128, 128)) if mask is None else mask.block
        total = batch * heads * math.ceil(call.q.shape[1] / block[0]) * math.ceil(call.k.shape[1] / block[1])
        tally = self.tallies.setdefault(self.generation.index if self.generation.active else 0, _Tally())
        tally.tiles += total
        if mask is None:
            tally.whole += total
        else:
            repeat = batch * heads // (mask.batch * mask.heads)
            kept = mask.lists()[1].sum(dtype=torch.int64) * repeat
            tally.kept = kept if tally.kept is None else tally.kept + kept
        self.peak_bytes = max(self.peak_bytes, self.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes that are remembered between steps."""
        return 0


def _fixed(method: Any, places: Places) -> tuple[TokenOrder | None, TileMask] | str:
    """The order and the mask of a method for these places, or why a call stays dense."""
    found = _UNLIKE if places.queries != places.keys else method.fixed(places)
    if isinstance(found, str):
        return found
    order, mask = found
    mask = mask.to(places.device)
    mask.lists(), mask.transposed_lists()  # whatever is made here is not made in a graph
    return None if order is None else order.to(places.device), mask


class FixedMask(SitePolicy):
    """Attention over a mask that depends on the tokens' places alone; made once for each shape.

    The method gives `fixed(places)`, the order of the tokens and the mask of tokens in that order, or why a call stays
    dense. Tokens are put in order here, unless the whole model runs in it.
    """

    making = staticmethod(_fixed)

    def __call__(self, call: AttentionCall) -> Tensor | None:
        """Attend, in the mask's order."""
        why = call.refusal() or self.dense_step()
        found = why if why is not None else self.made(call)
        if isinstance(found, str):
            return self.leave(found)
        order, mask = found
        self.count(mask, call)
        return attend(call, mask, order)


def _selected(method: Any, places: Places) -> tuple[TokenOrder | None, TileMask | None] | str:
    """The order of the tokens at these places and the tiles that hold text, or why a call stays dense."""
    order = method.token_order(places)
    if order is not None and places.queries != places.keys:
        return _UNLIKE
    if isinstance(order, str):
        return order
    return None if order is None else order.to(places.device), text_tiles(places, method.block)


class SelectedTiles(SitePolicy):
    """Attention over tiles that are chosen anew at every call, from the queries and keys themselves.

    The method gives `token_order(places)`, how tokens are ordered (None: as they are) or why a call stays dense, and
    `select(q, k, beside)`, the mask of queries and keys in that order; `beside` are the tiles that hold text.
    """

    making = staticmethod(_selected)

    def __call__(self, call: AttentionCall) -> Tensor | None:
        """Select and attend."""
        why = call.refusal() or self.dense_step()
        found = why if why is not None else self.made(call)
        if isinstance(found, str):
            return self.leave(found)
        order, beside = found
        q, k, v, bias, back = in_order(call, order)
        with torch.no_grad():
            mask = self.method.select(q, k, beside)
        self.count(mask, call)
        return back(self.attend(q, k, v, mask, call.scale, bias))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: TileMask, scale: float | None, bias: Tensor | None
    ) -> Tensor:
        """The result over the selected tiles."""
        return tile_attention(q, k, v, mask, scale=scale, bias=bias, **self.method.options())


def text_tiles(places: Places, block: tuple[int, int]) -> TileMask | None:
    """The tiles that hold text, as queries or as keys; None where there is no text."""
    if not places.text or not places.text[1]:
        return None
    start, end = places.text[0], sum(places.text)
    shape = (places.queries, places.keys)
    tiles = torch.zeros([-(-n // b) for n, b in zip(shape, block, strict=True)], dtype=torch.bool)
    tiles[:, start // block[1] : -(-end // block[1])] = True
    tiles[start // block[0] : -(-end // block[0])] = True
    return TileMask.from_tiles(tiles, shape, block).to(places.device)


def attend(call: AttentionCall, mask: TileMask, order: TokenOrder | None = None, **options: Any) -> Tensor:
    """`tile_attention` of a call, with its tokens in the order of the mask; options are of row-wise nature."""
    q, k, v, bias, back = in_order(call, order)
    return back(tile_attention(q, k, v, mask, scale=call.scale, bias=bias, **options))


def in_order(
    call: AttentionCall, order: TokenOrder | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """Queries, keys, values and bias of a call in an order, and what puts a result back.

    Where the whole model runs in this order there is nothing to do.
    """
    q, k, v, bias, have = call.q, call.k, call.v, call.bias(), call.order
    wanted = None if order is None or order.is_raster else order
    if have == wanted:
        return q, k, v, bias, _as_it_is
    if have is not None:  # another order than the model's: by way of the raster
        q, k, v, bias = have.undo(q), have.undo(k), have.undo(v), _moved_bias(have.undo, bias)
    if wanted is not None:
        q, k, v, bias = wanted.apply(q), wanted.apply(k), wanted.apply(v), _moved_bias(wanted.apply, bias)

    def back(out: Tensor) -> Tensor:
        out = out if wanted is None else wanted.undo(out)
        return out if have is None else have.apply(out)

    return q, k, v, bias, back


def _as_it_is(out: Tensor) -> Tensor:
    return out


def _moved_bias(move: Callable[..., Tensor], bias: Tensor | None) -> Tensor | None:
    """A bias `(B, H, Sq, Sk)` for tokens in another order; dims of 1 stay."""
    if bias is None:
        return None
    for dim in (2, 3):
        if bias.shape[dim] > 1:
            bias = move(bias, dim)
    return bias


def beside(grid: tuple[int, ...], text: tuple[int, int], patch: tuple[int, ...] | None = None) -> TokenOrder:
    """The order of a grid with its text before or after it."""
    start, length = text
    return TokenOrder(grid, patch, length if start == 0 else 0, 0 if start == 0 else length)
