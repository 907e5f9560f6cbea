"""What methods of cached-feature reuse share: where features are remembered, and what the report says of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol, get_args

from torch import nn

from ..masks import StepRule
from ..masks.signal import Signal
from ..models import Streams, block_adapter, stack_of, streams_of
from ..models._adapter import children_of
from ..patching.patch import Context
from ..patching.transaction import PatchError
from ..state.feature import Feature
from ..state.forecast import Forecaster
from ..state.generation import STATE, Generation
from ..state.history import Storage
from ..state.site import SITE, Refresh, Site, remember
from ..state.stack import ROLE, Stack, Tap

Level = Literal["output", "stack", "block", "module", "kv"]
LEVELS: tuple[str, ...] = get_args(Level)

# Children of blocks, by the names that diffusers and the original DiT use.
SELF_ATTENTION = ("attn", "attn1", "attention", "self_attn", "self_attention")
CROSS_ATTENTION = ("attn2", "cross_attn", "cross_attention", "crossattn")
MLPS = ("ff", "ff_context", "ffn", "mlp", "img_mlp", "txt_mlp", "feed_forward")
USUAL_SITES = (*SELF_ATTENTION, *CROSS_ATTENTION, *MLPS)

# Which models a method serves, for `maskaccel methods`.
STACKS = "any model whose loop over its blocks can be read (72 of the 76 transformers of diffusers)"
LEVELED = f"{STACKS}; level='module': lists of blocks with attention and MLP children"

# Projections of attention modules to keys and values, by diffusers' names.
KEYS_AND_VALUES = ("to_k", "to_v", "add_k_proj", "add_v_proj")


class Named(Protocol):
    """What these helpers need of a method."""

    @property
    def name(self) -> str:
        """How reports and errors call it."""


class CachedFeatures:
    """Base of the methods that remember features: all are lossy, and report alike.

    The base is no dataclass and has no fields; a method is a frozen dataclass of its own.
    """

    kind = "lossy"

    def activity(self, model: nn.Module) -> dict[str, Any]:
        """Calls computed and reused on a patched model, and bytes held now and at most."""
        return activity(model)


def check_level(level: str, allowed: Sequence[str] = LEVELS) -> None:
    """ValueError unless `level` is one of the allowed ones."""
    if level not in allowed:
        raise ValueError(f"level={level!r}; allowed are {', '.join(map(repr, allowed))}")


def attach(
    method: Named,
    context: Context,
    level: str,
    rule: StepRule,
    forecaster: Forecaster | None = None,
    storage: Storage | None = None,
) -> None:
    """Remember a model's features at one level.

    Args:
        method: On whose behalf.
        context: The model.
        level: `"output"`: what the model returns; `"stack"`: what all blocks together add to the residual stream;
            `"block"`: what each block adds; `"module"`: what attention and MLP return, with gates of the current step;
            `"kv"`: the keys and values of every attention, which the queries of the current step attend to.
        rule: The step mask.
        forecaster: Of what is remembered; None holds the last value.
        storage: How it is kept.
    """
    if level == "output":
        remember_modules(method, context, [context.model], rule, forecaster, storage, "remembered output")
    elif level == "module":
        modules = modules_of(method, context)
        remember_modules(method, context, modules, rule, forecaster, storage, "remembered")
    elif level == "kv":
        modules = projections_of(method, context)
        remember_modules(method, context, modules, rule, forecaster, storage, "remembered keys and values")
    else:
        attach_stack(method, context, rule, forecaster, storage, each=level == "block")


# ------------------------------------------------------------------------------------------------ modules
def remember_modules(
    method: Named,
    context: Context,
    modules: Iterable[nn.Module],
    rule: StepRule,
    forecaster: Forecaster | None = None,
    storage: Storage | None = None,
    action: str = "remembered",
    refresh: Refresh | None = None,
) -> list[Site]:
    """Remember what these modules return; a site for each."""
    generation = watch(method, context, rule)
    sites = []
    for module in modules:
        site = Site(generation, rule, forecaster, storage, refresh)
        remember(module, site, context.transaction, method.name)
        context.done(method.name, module, action)
        sites.append(site)
    return sites


def modules_of(method: Named, context: Context, wanted: Sequence[str] | None = None) -> list[nn.Module]:
    """The attention and MLP modules of every block whose outputs a cache may remember.

    Args:
        method: For errors and the report.
        context: The model.
        wanted: Only children of these names; None is all.
    """
    lists = block_lists(context.model)
    if not lists:
        raise PatchError(f"{method.name}: {type(context.model).__name__} has no list of blocks (an nn.ModuleList)")
    found = []
    for block in (block for children in lists for block in children):
        adapter = block_adapter(block)
        names = adapter.sites if adapter is not None else USUAL_SITES
        children = children_of(block, tuple(n for n in names if wanted is None or n in wanted))
        if not children:
            context.skip(method.name, block, f"it has no child named {', '.join(wanted or USUAL_SITES)}")
        found += children
    return found


def projections_of(method: Named, context: Context) -> list[nn.Module]:
    """The projections to keys and values, of image and text, in every block.

    Raises:
        PatchError: There are none: queries, keys and values come from one projection.
    """
    blocks = [block for children in block_lists(context.model) for block in children]
    modules = {id(m): m for block in blocks for m in block.modules()}
    found = [module for one in modules.values() for module in children_of(one, KEYS_AND_VALUES)]
    if not found:
        raise PatchError(
            f"{method.name}: no block of {type(context.model).__name__} has projections named "
            f"{' or '.join(KEYS_AND_VALUES)}"
        )
    return found


def block_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost module lists of the model that hold transformer blocks."""
    found: list[nn.ModuleList] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) and any(_looks_like_block(block) for block in child):
            found.append(child)
        elif not isinstance(child, nn.ModuleList):
            found += block_lists(child)
    return found


def _looks_like_block(module: nn.Module) -> bool:
    return block_adapter(module) is not None or bool(children_of(module, USUAL_SITES))


# -------------------------------------------------------------------------------------------------- stacks
def segments_of(method: Named, model: nn.Module) -> list[list[tuple[nn.Module, Streams]]]:
    """The model's blocks and their streams, segment by segment.

    Raises:
        PatchError: The model has no stack of blocks that can be skipped.
    """
    try:
        segments = [[(block, streams_of(block)) for block in blocks] for blocks in stack_of(model).segments]
    except LookupError as error:
        raise PatchError(f"{method.name}: the blocks of {type(model).__name__} cannot be skipped: {error}") from None
    for block, streams in (pair for segment in segments for pair in segment):
        if not streams.skippable:
            raise PatchError(f"{method.name}: {type(block).__name__} also returns something that is no stream")
    return segments


def attach_stack(
    method: Named,
    context: Context,
    rule: StepRule,
    forecaster: Forecaster | None = None,
    storage: Storage | None = None,
    *,
    lead: int = 0,
    tail: int = 0,
    tap: Tap | None = None,
    each: bool = False,
    adds: bool = True,
) -> list[Stack]:
    """Remember what the model's blocks add to the residual stream.

    Args:
        method: On whose behalf.
        context: The model.
        rule: A step mask or a signal.
        forecaster: Of the remembered change; None holds the last one.
        storage: How it is kept.
        lead: Blocks at the start that always run.
        tail: Blocks at the end that always run.
        tap: What a signal watches; None is what the leading blocks add.
        each: Every block by itself, instead of all of them together.
        adds: Remember what they add to their input; without it, what they hand on.

    Returns:
        The stacks: one, or with `each` one for every block.
    """
    segments = segments_of(method, context.model)
    count = sum(map(len, segments))
    if lead + tail >= count:
        raise PatchError(
            f"{method.name}: {type(context.model).__name__} has {count} blocks; {lead} leading and {tail} trailing "
            "ones leave none to skip"
        )
    leading, segments = _split(segments, lead)
    _, reversed_ = _split([segment[::-1] for segment in segments[::-1]], tail)
    segments = [segment[::-1] for segment in reversed_[::-1]]
    generation = watch(method, context, rule)
    group = context_parallel_group(context.model) if isinstance(rule, Signal) else None
    # Of each stack its segments, of each segment its blocks.
    plans = [[[pair]] for segment in segments for pair in segment] if each else [segments]
    stacks = []
    for chosen in plans:
        pairs = [([b for b, _ in segment], [s for _, s in segment]) for segment in chosen]
        stack = Stack(generation, pairs, rule, forecaster, storage, lead=leading, tap=tap, group=group, adds=adds)
        stack.attach(context.transaction, method.name)
        stacks.append(stack)
    for segment in segments:
        for block, _ in segment:
            context.done(method.name, block, "remembered by itself" if each else "remembered together")
    for block, _ in leading:
        context.done(method.name, block, "always computed")
    return stacks


def _split(
    segments: list[list[tuple[nn.Module, Streams]]], count: int
) -> tuple[list[tuple[nn.Module, Streams]], list[list[tuple[nn.Module, Streams]]]]:
    """The first `count` blocks, and the segments without them."""
    taken: list[tuple[nn.Module, Streams]] = []
    rest = []
    for segment in segments:
        here = min(count - len(taken), len(segment))
        taken += segment[:here]
        if segment[here:]:
            rest.append(segment[here:])
    return taken, rest


def context_parallel_group(model: nn.Module) -> Any:
    """The process group whose ranks share one sequence of this model (diffusers' context parallelism), or None."""
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    mesh = getattr(config, "_flattened_mesh", None)
    return None if mesh is None else mesh.get_group()


# -------------------------------------------------------------------------------------------------- report
def watch(method: Named, context: Context, rule: StepRule) -> Generation:
    """The model's generation; a run in which the rule can never reuse anything is warned about."""
    generation = context.track_generation(method.name)
    rules = generation.rules.setdefault(method.name, [])
    if rule not in rules:
        rules.append(rule)
    return generation


def stacks_of(model: nn.Module) -> list[Stack]:
    """The stacks of a patched model."""
    found = (m.__dict__[ROLE].stack for m in model.modules() if ROLE in m.__dict__)
    return list({id(stack): stack for stack in found}.values())


def activity(model: nn.Module) -> dict[str, Any]:
    """What caching did on a patched model: calls computed and reused, bytes held now and at most."""
    sites: list[Site] = [m.__dict__[SITE] for m in model.modules() if SITE in m.__dict__]
    stacks = stacks_of(model)
    features: list[Feature] = [s.feature for s in sites] + [g.feature for s in stacks for g in s.segments]
    generation: Generation | None = model.__dict__.get(STATE)
    found: dict[str, Any] = {
        "computed": sum(s.computed for s in sites) + sum(s.computed for s in stacks),
        "reused": sum(s.reused for s in sites) + sum(s.reused for s in stacks),
    }
    in_part = sum(s.refreshed for s in sites) + sum(s.mixed for s in stacks)
    if in_part:
        found["in part"] = in_part
    found["resets"] = sum(f.resets for f in features)
    found["bytes held"] = sum(f.nbytes for f in features) + sum(s.nbytes for s in stacks)
    found["peak bytes"] = 0 if generation is None else generation.peak_bytes
    if len(stacks) == 1:
        for branch, letters in stacks[0].actions.items():
            found[f"steps {branch}".strip()] = "".join(letters)
    if any(f.refused for f in features):
        found["warning"] = (
            "the model ran several times a step in one guidance branch, where nothing can be reused; "
            "name the branches: `with run.branch(...)`"
        )
    return found


__all__ = [
    "LEVELS",
    "CachedFeatures",
    "Level",
    "activity",
    "attach",
    "attach_stack",
    "check_level",
    "modules_of",
    "remember_modules",
    "segments_of",
    "stacks_of",
    "watch",
]
