"""How methods take over the attention of a model: its sites, and a policy that is called in place of each attention.

A method asks for the sites and gives each a policy::

    def attach(self, context: Context) -> None:
        for site in attention_sites(context, self.name, kinds=("self", "joint")):
            bridge(context, self.name, site, self.attention, grid=self.grid)

    def attention(self, call: AttentionCall) -> Tensor | None:
        if call.refusal() is not None or call.grid is None:
            return None  # this call stays dense
        mask = ...  # a TileMask of call.grid and call.text
        return tile_attention(call.q, call.k, call.v, mask, scale=call.scale, bias=call.bias())

The module's own code stays: a copy of the functions that lead to the attention is made in which
`scaled_dot_product_attention` and diffusers' `dispatch_attention_fn` are replaced, and nothing else. So it does not
matter which processor a module has, which version, or whether another method of the same patch fuses it. There is no
mode and no global switch: the copy belongs to one module, and `torch.compile(fullgraph=True)` sees plain functions.
Blocks that are compiled one by one share their graph as long as the policy does not read what differs between them.

A policy is an object that is copied with the model (a function is shared by the copies), and runs inside the graph
of a compiled model: what it reads of `call.site` and `call.generation` becomes a constant there. What depends on the
places of the tokens alone, such as a fixed mask, is made by an `Once` that all sites of a model share.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..masks import TokenOrder
from ..models import stack_of
from ..models._attention import derived
from ..models._tokens import Kind, kind_of, tokens_of
from ..state.generation import Generation
from ._code import SITE, Code
from .layout import TokenLayout
from .once import Once, Places
from .patch import Context
from .transaction import PatchError

KINDS: tuple[str, ...] = get_args(Kind)

Policy = Callable[["AttentionCall"], "Tensor | None"]


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention module of a model.

    Attributes:
        module: The module.
        name: Its name within the model.
        kind: `"self"`: among latent tokens; `"joint"`: among latent and text tokens in one sequence; `"cross"`: of
            latent tokens to others; `"other"`: anything else (text refiners, sound, poolers).
        layer: Number of its block in the stack of the model's blocks, in the order of execution, from 0. Blocks beside
            the stack (refiners of noise, control) are counted by themselves, as are those of `"other"` sites.
        layers: How many such blocks there are.
    """

    module: nn.Module
    name: str
    kind: Kind
    layer: int
    layers: int


class AttentionCall:
    """One call of an attention, as a policy gets it.

    Attributes:
        q: Queries `(B, Sq, H, D)`, after norms and rotary embedding; a view of what the model computed.
        k: Keys `(B, Sk, Hk, D)`.
        v: Values `(B, Sk, Hk, Dv)`.
        mask: The mask that the model gives, broadcastable to `(B, H, Sq, Sk)`, boolean (False is masked) or additive;
            or None. A policy must honour it: `bias()` is what `tile_attention` takes for it. It may be a `BlockMask`
            of flex attention, which `refusal()` names.
        scale: Factor of the scores.
        is_causal: Whether the model asks for causal attention.
        dropout_p: Dropout probability that the model asks for.
        enable_gqa: Whether keys may have fewer heads than queries.
        part: Number of this attention within the call of its module, from 0: image-to-video models attend to text and
            to an image, Mochi to each sample by itself.
    """

    def __init__(self, bridged: Bridged, given: dict[str, Any], heads_first: bool,
                 attention: Callable[..., Tensor]) -> None:  # fmt: skip
        q, k, v = given["query"], given["key"], given["value"]
        device = q.device.type
        # What the attention itself would cast to.
        if device != "meta" and torch.is_autocast_enabled(device) and q.dtype != torch.float64:
            q, k, v = (t.to(torch.get_autocast_dtype(device)) for t in (q, k, v))
        if heads_first:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        self.q, self.k, self.v = q, k, v
        self.mask: Tensor | None = given["attn_mask"]
        if not heads_first and isinstance(self.mask, Tensor) and self.mask.shape == (k.shape[0], k.shape[1]):
            self.mask = self.mask[:, None, None, :]  # what diffusers does with a padding mask
        self.scale: float = q.shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
        self.is_causal, self.dropout_p = given["is_causal"], given["dropout_p"]
        self.enable_gqa = given["enable_gqa"]
        self.part = bridged.part
        self._special = given.get("attention_kwargs")
        self._bridged, self._attention, self._heads_first = bridged, attention, heads_first

    @property
    def site(self) -> AttentionSite:
        """Whose call it is."""
        return self._bridged.site

    @property
    def generation(self) -> Generation:
        """The model's generation: `index` is the step, `branch_key` the guidance branch.

        Followed only if the method asked `context.track_generation(name)`.
        """
        return self._bridged.generation

    @property
    def text(self) -> tuple[int, int] | None:
        """Where the text is in a joint sequence: `(start, length)`; length 0 if it holds none, None if unknown."""
        return self._bridged.text(self.k.shape[1])

    @property
    def places(self) -> Places:
        """What a fixed mask depends on."""
        q, k, index = self.q, self.k, operator.index  # of sizes: a graph holds for these alone
        return Places(self.grid, self.text, index(q.shape[1]), index(k.shape[1]), index(q.shape[2]), q.device)

    @property
    def grid(self) -> tuple[int, ...] | None:
        """The latent tokens' grid, row-major: `(height, width)` or `(frames, height, width)`; None if unknown.

        The product is the number of queries, without the text.
        """
        return self._bridged.grid_of(self.q.shape[1], self.k.shape[1])

    @property
    def order(self) -> TokenOrder | None:
        """The order that the tokens are in already, text included; None: raster."""
        order = self._bridged.layout.order
        if order is None or self.text is None:
            return None
        start, length = self.text
        first, last = (length, 0) if start == 0 else (0, length)
        return (
            order if (order.prefix, order.suffix) == (first, last) else TokenOrder(order.grid, order.patch, first, last)
        )

    def dense(self, *, is_causal: bool | None = None, **instead: Tensor | None) -> Tensor:
        """What the model's own attention gives, `(B, Sq, H, Dv)`.

        Args:
            is_causal: To take in place of that of the call.
            **instead: `q`, `k`, `v` or `mask` to take in place of those of the call, in the layouts of the attributes.
        """
        if self._heads_first:
            instead = {n: t if n == "mask" or t is None else t.transpose(1, 2) for n, t in instead.items()}
        given: dict[str, Any] = {} if is_causal is None else {"is_causal": is_causal}
        out = self._attention(**given, **{_NAMES[name]: value for name, value in instead.items()})
        return out.transpose(1, 2) if self._heads_first else out

    def bias(self) -> Tensor | None:
        """The model's mask as `tile_attention` takes it: additive, four dims, each full or 1; None without a mask.

        A boolean mask becomes 0 and -inf, an additive one stays as it is: the scores are the same to the bit.

        Raises:
            TypeError: The mask is no tensor.
        """
        mask = self.mask
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise TypeError(f"attn_mask of {self.site.name} is a {type(mask).__name__}; only a tensor is a bias")
        if mask.dtype == torch.bool:
            mask = derived(mask, f"_maskaccel_bias_{self.q.dtype}", functools.partial(_additive, dtype=self.q.dtype))
        elif mask.dtype not in (self.q.dtype, torch.float32):
            mask = mask.float()
        return mask[(None,) * (4 - mask.ndim)]

    def refusal(self) -> str | None:
        """Why `tile_attention` cannot stand in for this call, in words; None if it can."""
        if self.dropout_p:
            return f"dropout_p={self.dropout_p}"
        if self.is_causal:
            return "is_causal=True"
        if self.mask is not None and not isinstance(self.mask, Tensor):
            return f"attn_mask is a {type(self.mask).__name__}"
        if self._special:
            return f"attention_kwargs={sorted(self._special)} are for one backend of diffusers"
        width = self.q.shape[-1]
        if self.v.shape[-1] != width:
            return f"values of width {self.v.shape[-1]}, queries of {width}"
        if width % 8 or not 16 <= width <= 256:
            return f"head dim {width}, not a multiple of 8 from 16 to 256"
        if not (self.q.dtype == self.k.dtype == self.v.dtype):
            return f"queries, keys and values of {self.q.dtype}, {self.k.dtype} and {self.v.dtype}"
        return None


def _additive(mask: Tensor, *, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


# The arguments that scaled_dot_product_attention and dispatch_attention_fn share, in their order, and defaults.
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_NAMES = {"q": "query", "k": "key", "v": "value", "mask": "attn_mask"}
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


class Bridged:
    """The policy of one site, and what its calls are told.

    Attributes:
        site: The site.
        calls: Calls so far, those in compiled graphs left out.
        left: How many of them the policy left dense.
        part: Attentions so far in this call of the module.
    """

    def __init__(self, site: AttentionSite, method: str, policy: Policy, layout: TokenLayout, generation: Generation,
                 grid: tuple[int, ...] | None) -> None:  # fmt: skip
        self.site, self.method, self.policy, self.layout, self.generation = site, method, policy, layout, generation
        self.grid = grid
        self._temporal = "temporal" in site.name  # not read in graphs: blocks with names of their own would share none
        self.calls = self.left = self.part = 0

    def text(self, rows: int) -> tuple[int, int] | None:
        """Where the text is in a sequence of so many rows."""
        if self.site.kind != "joint":
            return 0, 0
        length = self.layout.text
        if length is None:
            routed = self.layout.routed
            grid = self.layout.grid if self.grid is None else self.grid
            if grid is None and routed is None:
                return None
            length = rows - (_product(grid or ()) if routed is None else routed.kept)
        rows, length = operator.index(rows), operator.index(length)
        if not 0 <= length <= rows or self.layout.tokens.text is None:
            return None
        return (0 if self.layout.tokens.text == "first" else rows - length), length

    def grid_of(self, queries: int, keys: int) -> tuple[int, ...] | None:
        """The grid of the latent tokens among so many queries."""
        text, grid = self.text(keys), self.layout.grid if self.grid is None else self.grid
        if grid is None or text is None:
            return None
        rows = queries - text[1] if queries == keys else queries
        routed = self.layout.routed
        if routed is not None and self.site.kind != "cross":
            kept = routed.grid
            return kept if kept is not None and _product(kept) == rows else None
        parts: tuple[tuple[int, ...], ...] = (grid,)
        if self.site.kind == "self" and len(grid) == 3:  # attention along time, or within a frame
            parts = (grid[:1],) if self._temporal else (grid, grid[1:])
        found = next((part for part in parts if _product(part) == rows), None)
        # A call with some of the queries only is no error: methods that compute some tokens make such calls.
        some = self.layout.grid is not None and _product(self.layout.grid) == _product(grid)
        if found is None and self.grid is not None and self.site.kind != "cross" and not some:
            raise ValueError(
                f"{self.method}: grid={self.grid} has {_product(grid)} tokens, {self.site.name} has {rows}"
            )
        return None if found is None else tuple(map(operator.index, found))

    def attend(self, attention: Callable[..., Tensor], heads_first: bool, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One call: the policy, or the model's own attention where it gives None."""
        if kwargs.get("parallel_config") is not None:
            raise PatchError(
                f"{self.method}: {self.site.name} runs under context parallelism (parallel_config is given), where a "
                "rank holds a part of the sequence only; disable one of them"
            )
        named = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        given, out = _DEFAULTS | named, None
        if given["query"].ndim == 4:
            out = self.policy(AttentionCall(self, given, heads_first, lambda **new: attention(**(named | new))))
        self.part += 1
        if not torch.compiler.is_compiling():
            self.calls += 1
            self.left += out is None
        if out is None:
            return attention(*args, **kwargs)
        out = out.transpose(1, 2) if heads_first else out
        expected = (*given["query"].shape[:3], given["value"].shape[3])
        if tuple(out.shape) != expected:
            raise ValueError(f"{self.method}: the policy of {self.site.name} returned shape {tuple(out.shape)}; it must"
                             f" be (B, Sq, H, Dv), here {expected}")  # fmt: skip
        return out


def _product(grid: Sequence[int]) -> int:
    n = 1
    for extent in grid:
        n *= extent
    return n


# ------------------------------------------------------------------------------------------------ what methods call


def attention_sites(
    context: Context, method: str, kinds: Sequence[Kind] = ("self", "joint", "cross")
) -> list[AttentionSite]:
    """The attention modules of a model that can be taken over.

    Modules that are attention by their name, but whose code leads to no attention function, are reported as skipped.

    Args:
        context: The model.
        method: On whose behalf.
        kinds: Which kinds; see `AttentionSite`.

    Returns:
        The sites, in the order of the model's modules.

    Raises:
        ValueError: `kinds` names no kind.
    """
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds={tuple(kinds)!r}; allowed are {', '.join(map(repr, KINDS))}")
    state = _state(context)
    for module, reason in state.unreached:
        context.skip(method, module, reason)
    return [site for site in state.sites if site.kind in kinds]


def bridge(
    context: Context, method: str, site: AttentionSite, policy: Policy, *, grid: Sequence[int] | None = None
) -> None:
    """Plan that `policy` is called in place of a site's attention.

    Args:
        context: The model.
        method: On whose behalf.
        site: One of `attention_sites`.
        policy: Called with an `AttentionCall`; returns `(B, Sq, H, Dv)`, or None to leave the call dense.
        grid: The grid of the latent tokens, where the user gives it; None is the one that the model's call tells.

    Raises:
        PatchError: Another method has the attention of this module, or its forward has been replaced.
    """
    state, transaction, module = _state(context), context.transaction, site.module
    transaction.claim(module, "attention", method)
    if not state.bridged:
        state.bridged = True
        transaction.pre_hook(context.model, state.layout.read)
    given = None if grid is None else TokenOrder(grid).grid  # which checks it
    bridged = Bridged(site, method, policy, state.layout, context.generation, given)
    if _processor_of(module) is not None:
        # What the processor finally is, another method of this patch may decide after this one.
        transaction.derive(module, "processor", functools.partial(_bridged_processor, state.code, bridged))
    else:
        cls = type(module)
        transaction.replace_forward(module, state.code.entry(cls, "forward"), method)
        for name, value in state.code.attributes(module).items():
            transaction.set(module, name, value, method)
        for name in state.code.methods(cls):
            if name != "forward":
                transaction.set(module, name, state.code.method(cls, name).__get__(module, cls), method)
    transaction.set(module, SITE, bridged, method)
    context.done(method, module, f"{site.kind} attention")


def _bridged_processor(code: Code, bridged: Bridged, processor: Any) -> Any:
    """A copy of a processor whose attention is the policy's."""
    cls = type(processor)
    if not code.methods(cls) and not code.attributes(processor):
        raise PatchError(f"{bridged.method}: {cls.__name__} of {bridged.site.name} calls no known attention function")
    new: Any = object.__new__(code.processor_class(cls))
    new.__dict__.update({**vars(processor), **code.attributes(processor), SITE: bridged})
    return new


def attention_activity(model: nn.Module, method: str) -> dict[str, Any]:
    """What a method's policies did on a patched model: calls, and how many they left dense (outside of graphs)."""
    found = [m.__dict__[SITE] for m in model.modules() if SITE in m.__dict__]
    mine = [bridged for bridged in found if bridged.method == method]
    return {"attention calls": sum(b.calls for b in mine), "left dense": sum(b.left for b in mine)}


# ------------------------------------------------------------------------------------------------ finding the sites


class _State:
    """What is found out about the attention of one model, once for all methods of a patch."""

    def __init__(self, context: Context) -> None:
        model = context.model
        self.code, tokens = Code(), tokens_of(model)
        self.layout = TokenLayout(model, tokens)
        self.bridged = False
        self.unreached: list[tuple[nn.Module, str]] = []
        found: list[tuple[str, nn.Module, Kind]] = []
        for name, module in model.named_modules():
            reason = self._unreachable(module)
            if reason is None:
                found.append((name, module, kind_of(tokens, name, module)))
            elif _looks_like_attention(module):
                self.unreached.append((module, reason))
        reached = {id(module) for _, module, _ in found}
        self.unreached = [(m, why) for m, why in self.unreached if not any(id(c) in reached for c in m.modules())]
        numbers = _numbered(model, found)
        self.sites = [AttentionSite(module, name, kind, *numbers[name]) for name, module, kind in found]

    def _unreachable(self, module: nn.Module) -> str | None:
        """Why the attention of a module cannot be taken over; None if it can."""
        processor = _processor_of(module)
        owner = module if processor is None else processor
        entry = "forward" if processor is None else "__call__"
        cls = type(owner)
        if not self.code.methods(cls) and not self.code.attributes(owner):
            return f"{cls.__name__}.{entry} calls no scaled_dot_product_attention or dispatch_attention_fn"
        return None


def layout_of(context: Context) -> TokenLayout:
    """What the calls of a model say of their tokens; kept up to date once a method has asked."""
    return _state(context).layout


def _state(context: Context) -> _State:
    state = context.__dict__.get(SITE)
    if state is None:
        state = context.__dict__[SITE] = _State(context)
    return state


def _processor_of(module: nn.Module) -> Any:
    processor = getattr(module, "processor", None)
    return processor if callable(processor) else None


def _looks_like_attention(module: nn.Module) -> bool:
    return re.search(r"attn|attention", type(module).__name__, re.IGNORECASE) is not None


def _block(name: str) -> str:
    """The name of the block that holds a module: up to the last number in its path."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])


def _numbered(model: nn.Module, found: Sequence[tuple[str, nn.Module, Kind]]) -> dict[str, tuple[int, int]]:
    """For the name of each site the number of its block, and how many there are of its sort."""
    try:
        stack = [name for segment in stack_of(model).names for name in segment]
    except LookupError:
        stack = []
    main = dict.fromkeys(_block(name) for name, _, kind in found if kind != "other")
    inside = [name for name in stack if name in main]
    beside = [name for name in main if name not in inside]
    other = list(dict.fromkeys(_block(name) for name, _, kind in found if kind == "other"))
    numbers = {}
    for name, _, kind in found:
        block = _block(name)
        group = other if kind == "other" else inside if block in inside else beside
        numbers[name] = (group.index(block), len(group))
    return numbers


__all__ = [
    "KINDS",
    "AttentionCall",
    "AttentionSite",
    "Bridged",
    "Kind",
    "Once",
    "Places",
    "TokenLayout",
    "attention_activity",
    "attention_sites",
    "bridge",
    "layout_of",
]
