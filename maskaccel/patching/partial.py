"""Steps in part: a model computes some tokens, which attend to the cached keys and values of all of them.

At such a step every block runs on the rows of the active tokens (`patching/span.py`); text is always active. In its
attention the active queries see all tokens: the keys and values of the active ones are written over their rows of what
the last dense step left (`state/kv.py`). What the model gives for the other tokens is what it gave at the step before.

A method says how tokens are chosen, as a `Selector`; all the rest is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..masks import StepRule, TokenIndex
from ..masks.schedule import At
from ..models import stack_of
from ..ops import scatter_merge
from ..state import solver
from ..state._once import OncePerStep
from ..state.generation import Generation
from ..state.kv import KVRows, KVStorage
from ..state.solver import Point
from ._spans import SPANS
from .active_attention import CLEAN, FILL, PARTIAL, ActiveAttention, Detail
from .attention import TokenLayout, attention_sites, bridge, layout_of
from .latents import LatentGrid
from .patch import Context
from .selector import Seen, Selector
from .span import SpanCall, attach_span
from .transaction import PatchError

ACTIVE = "_maskaccel_active_tokens"

_NO_RUN = "no run was begun: `with patch.generation(steps) as run` in a loop of your own"
_GRADIENTS = "gradients were on: call the model under torch.no_grad()"
_TIMES = ("timestep", "timesteps", "t")


@dataclass
class Counts:
    """What the calls of a model were."""

    dense: int = 0
    partial: int = 0
    outside: int = 0
    why_outside: str = ""
    tokens: int = 0
    all_tokens: int = 0
    letters: dict[str, list[str]] = field(default_factory=dict)


class ActiveTokens:
    """The steps in part of one model: a wrapper of its forward, the controller of its span, a watcher of its solver.

    Attributes:
        counts: What its calls were.
        kv: Keys and values.
        beside: Keys and values of the call without noise, where the selector mixes them in.
        index: The tokens of the step at hand; None: all of them.
        kernel: Whether active tokens attend through `tile_attention`, not the model's own attention.
        entered: The tokens that the call at hand runs on, or the last one ran on.
        tokens: All tokens of the call at hand or the last one, those of reference images with the latents'.
    """

    def __init__(self, method: str, generation: Generation, layout: TokenLayout, rule: StepRule, selector: Selector,
                 grid: tuple[int, ...] | None = None) -> None:  # fmt: skip
        self.method, self.generation, self.layout = method, generation, layout
        self.rule, self.selector, self.given_grid = rule, selector, grid
        self.counts = Counts()
        self.kv: KVRows
        self.beside: KVRows | None = None  # of the call without noise
        self.share = 1.0
        self.kernel = False
        self.levels: solver.Levels | None = None
        self.tokens = 0
        self.entered: TokenIndex | None = None
        self.mode: str | None = None
        self.branch = ""
        self.index: TokenIndex | None = None
        self.details: dict[Any, Detail] = {}
        self._outputs: dict[str, list[Tensor]] = {}
        self._shapes: dict[str, Any] = {}  # of the arguments that the keys and values of a branch belong to
        self._calls = OncePerStep(generation, "nothing is computed in part")
        self._called = -1
        self._run = -1
        self.watched = 0  # steps of the solver that were seen
        generation.memories.append(self)
        if selector.stale:
            generation.watchers.append(self)

    def __getstate__(self) -> dict[str, Any]:
        empty: dict[str, Any] = {name: {} for name in ("_outputs", "_shapes", "details")}
        fresh: dict[str, Any] = {"index": None, "mode": None, "_called": -1}
        return {**self.__dict__, **empty, **fresh}

    @property
    def nbytes(self) -> int:
        """Bytes of the outputs that are kept; keys and values count by themselves."""
        return sum(t.nbytes for outputs in self._outputs.values() for t in outputs)

    def clear(self) -> None:
        """Forget everything."""
        self._outputs.clear()
        self._shapes.clear()
        self.details.clear()
        self._calls.clear()
        self.selector.clear()
        self.index, self._called = None, -1

    @property
    def where(self) -> LatentGrid | None:
        """Where the latent tokens of the call at hand, or of the last one, are; None if that is not known."""
        grid = self.given_grid or self.layout.grid or self.layout.front
        return None if grid is None else LatentGrid(grid, self.layout.tokens.axes)

    # ------------------------------------------------------------------------------------------- a call of the model
    def __call__(self, model: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """One call of the model, as a wrapper of its forward."""
        at = self.generation
        if not at.active or torch.is_grad_enabled():
            self.counts.outside += 1
            self.counts.why_outside = _GRADIENTS if at.active else _NO_RUN
            return inner(*args, **kwargs)
        if self._calls.key(0) is None:
            return inner(*args, **kwargs)
        self._called, self.branch = at.index, at.branch_key
        named = dict(zip(self.layout.names, args, strict=False)) | kwargs
        self.selector.begin(named)
        partial = self.rule.action(at) == "partial" or self._clean_call(model, inner, named)
        partial = partial and (self.selector.static or self.index is not None)
        shapes = _shapes(named)
        held = self.kv.complete(self.branch) and self._shapes.setdefault(self.branch, shapes) == shapes
        mode = PARTIAL if partial and held else FILL if self._is_partial_next() else None
        if mode == FILL:
            self._shapes[self.branch] = shapes
            self._outputs.pop(self.branch, None)
        output, index = self._in(mode, inner, args, kwargs)
        self._count(index)
        return self._merged(output, index) if self.selector.stale else output

    def _clean_call(self, model: nn.Module, inner: Callable[..., Any], named: dict[str, Any]) -> bool:
        """The call on other latents, where there is one; whether it does for the dense step at hand."""
        at, name, level = self.generation, self.layout.names[0], self.selector.level
        if at.index or (clean := self.selector.clean()) is None:
            return False
        latents = named[name]
        time = next((n for n in _TIMES if isinstance(named.get(n), Tensor)), None)
        if not isinstance(latents, Tensor) or not _holds(latents, clean) or time is None:
            shape = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"{self.method}: the model takes latents {shape}; it cannot be called with those of the "
                             f"reference, {tuple(clean.shape)}")  # fmt: skip
        clean = clean.to(latents).repeat(latents.shape[0] // clean.shape[0], *[1] * (clean.dim() - 1))
        start = 1.0 if at.timesteps is None else at.timesteps[0] / 1000
        if level:
            assert self.levels is not None
            clean = self.levels.moved(latents, clean, start, level)
        then = named[time] * (level / start)
        then = then if then.dtype == named[time].dtype else then.round().to(named[time].dtype)
        _, index = self._in(CLEAN, inner, (), named | {name: clean, time: then})
        model.__dict__[SPANS].begin(model, (), named)  # the call that is under way begins once more
        return index is not None

    def _in(
        self, mode: str | None, inner: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Any, TokenIndex | None]:
        """A call in a mode, and the tokens that it computed."""
        kept = self.beside if mode == CLEAN and self.beside is not None else self.kv
        self.mode, self.entered = mode, None
        if mode in (FILL, CLEAN):
            kept.begin(self.branch)
        try:
            output = inner(*args, **kwargs)
        finally:
            self.mode = None
        if mode in (FILL, CLEAN):
            kept.end(self.branch)
        return output, self.entered

    def _is_partial_next(self) -> bool:
        """Whether the next step may be computed in part, so that this one has to leave its keys and values."""
        at = self.generation
        if at.num_steps is not None and at.index + 1 >= at.num_steps:
            return False
        try:
            # Without the timesteps, which may be on a device: a rule that asks for them may call any step partial.
            return self.rule.action(At(at.index + 1, at.num_steps, offset=at.offset)) == "partial"
        except ValueError:
            return True

    def _merged(self, output: Any, index: TokenIndex | None) -> Any:
        """The output with that of the step before in the tokens that were not computed."""
        leaves, form = pytree.tree_flatten(output)
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        before = self._outputs.get(self.branch)
        if index is not None and before is not None:
            tensors = self._merge(tensors, before, index)
        self._outputs[self.branch] = [t.clone() for t in tensors]
        rest = iter(tensors)
        return pytree.tree_unflatten([next(rest) if isinstance(t, Tensor) else t for t in leaves], form)

    def _merge(self, new: list[Tensor], old: list[Tensor], index: TokenIndex) -> list[Tensor]:
        """Outputs of a step: one tensor for all samples, others being no latents (sound); or one for each sample."""
        where = self.where
        assert where is not None
        mask = index.mask[:, : where.count]
        batch = len(new) if new[0].dim() == len(where.grid) + 1 and not where.fits(new[0]) else 0
        if batch:  # one tensor for each sample
            masks = mask.expand(batch, -1) if index.batch == 1 else mask
            pairs = zip(masks, new, old, strict=True)
            return [torch.where(where.spread(m[None], a[None])[0], a, b) for m, a, b in pairs]
        first = torch.where(where.spread(mask, new[0]), new[0], old[0])
        return [first, *(torch.where(where.spread(mask, a), a, b) if where.fits(a) else a
                         for a, b in zip(new[1:], old[1:], strict=True))]  # fmt: skip

    def _count(self, index: TokenIndex | None) -> None:
        counts, at = self.counts, self.generation
        if self._run != at.run:
            self._run, counts.letters = at.run, {}
        line = counts.letters.setdefault(self.branch, [])
        line += " " * (at.index - len(line)) + ("C" if index is None else "p")
        if index is None:
            counts.dense += 1
        else:
            counts.partial += 1
            counts.tokens += index.kept
            counts.all_tokens += index.n

    # ------------------------------------------------------------------------------------- the controller of the span
    def choose(self, call: SpanCall) -> TokenIndex | None:
        """The tokens of this call of the model."""
        hidden, self.tokens = call.hidden, call.tokens
        assert hidden is not None
        if self.mode == CLEAN and self.beside is None:
            index = self.selector.clean_tokens(self._known_grid(call), call.tokens, hidden.device)
        elif self.mode == PARTIAL:
            index = self.index
            if index is None:
                grid = self._known_grid(call) if self.selector.stale else ()
                index = self.selector.fixed(grid, call.tokens, hidden.device)
        else:
            return None
        if index is None:
            return None
        if index.n != call.tokens:
            index = _with_more(index, call.tokens)
        if index.batch > 1:
            if call.batch % index.batch:
                raise ValueError(f"{self.method}: tokens are chosen for {index.batch} samples; a call has {call.batch}")
            index = _repeated(index, call.batch // index.batch)
        self.entered = index
        return index

    def _known_grid(self, call: SpanCall) -> tuple[int, ...]:
        where = self.where
        if where is None or where.count > call.tokens:
            known = "not known" if where is None else f"{where.grid}, which does not fit"
            raise ValueError(f"{self.method}: the grid of the {call.tokens} tokens is {known}; give grid=")
        return where.grid

    def reenter(self, call: SpanCall, rows: Tensor) -> Tensor:
        """All tokens, zeros in those that were not computed: their output is replaced."""
        assert call.index is not None
        return scatter_merge(None, rows, call.index, mode="zero")

    # ------------------------------------------------------------------------------------------ what the solver gets
    def check(self, scheduler: Any, given: Mapping[str, Any]) -> None:
        """ValueError if this step of a solver adds noise."""
        argument = solver.noise_argument(given) if self.selector.stale else None
        if argument is not None:
            raise ValueError(f"{self.method}: {type(scheduler).__name__}.step with {argument} adds noise, and tokens "
                             "that are not computed keep the output of an earlier step; give 0")  # fmt: skip

    def seen(self, output: Tensor, sample: Tensor, point: Point) -> Tensor:
        """Choose the tokens of the next step."""
        at, where = self.generation, self.where
        self.watched += 1
        if self._called != at.index or where is None:
            return output
        seen = Seen(output, sample, point, where, at.index, at.num_steps, self.entered)
        with torch.no_grad():
            output = self.selector.corrected(seen)
            self.index = None
            # Of the next step: its level is not known yet, and differs little.
            self.share = self.selector.cached_share(point)
            if not seen.last and self._is_partial_next():
                self.index = self.selector.select(seen)
        return output


def _shapes(named: Mapping[str, Any]) -> dict[str, Any]:
    """What has to stay the same for keys and values to fit a call."""
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor | list)}
    return {n: v.shape if isinstance(v, Tensor) else [getattr(t, "shape", None) for t in v] for n, v in tensors.items()}


def _holds(latents: Tensor, clean: Tensor) -> bool:
    """Whether latents hold the batch of a reference, once or for several guidance branches."""
    return latents.shape[1:] == clean.shape[1:] and latents.shape[0] % clean.shape[0] == 0


def _with_more(index: TokenIndex, tokens: int) -> TokenIndex:
    """The index among more tokens (of reference images) after its own, none of them active."""
    if index.n > tokens:
        raise ValueError(f"tokens are chosen among {index.n}; the model has {tokens}")
    inverse = torch.nn.functional.pad(index.inverse, (0, tokens - index.n), value=-1)
    return TokenIndex(index.keep.where(index.keep < index.n, tokens), inverse, index.counts)


def _repeated(index: TokenIndex, times: int) -> TokenIndex:
    """The index for a batch that holds its samples several times, one guidance branch after the other."""
    if times == 1:
        return index
    counts = None if index.counts is None else index.counts.repeat(times)
    return TokenIndex(index.keep.repeat(times, 1), index.inverse.repeat(times, 1), counts, index.grid)


def attach_active(
    context: Context, method: str, rule: StepRule, selector: Selector, storage: KVStorage,
    grid: tuple[int, ...] | None = None, attention: type[ActiveAttention] = ActiveAttention,
) -> ActiveTokens:  # fmt: skip
    """Plan that a model computes the tokens that a selector chooses at the steps that a rule calls `"partial"`.

    Args:
        context: The model.
        method: On whose behalf.
        rule: The step mask.
        selector: How tokens are chosen; copied with the model.
        storage: How keys and values are kept.
        grid: The grid of the latent tokens, where the user gives it.
        attention: The policy of each attention.

    Raises:
        PatchError: The model's blocks cannot run on some of the tokens, none of its attentions can be reached, or the
            pipeline's solver mixes outputs of several steps.
    """
    why = solver.refusal(context.scheduler) if selector.stale and context.scheduler is not None else None
    if why is not None:
        raise PatchError(f"{method}: {why}")
    levels = solver.Levels.of(context.scheduler)
    if selector.level and levels is None:
        raise PatchError(f"{method}: a call at noise level {selector.level} needs a scheduler for flow matching, or "
                         f"DDIM; {type(context.scheduler).__name__} scales latents before the model")  # fmt: skip
    if selector.stale:
        context.drops = method
    generation = context.track_generation(method)
    generation.rules.setdefault(method, []).append(rule)
    run = ActiveTokens(method, generation, layout_of(context), rule, selector, grid)
    run.levels = levels
    attach_span(context, method, 0, -1, run)
    inside = {id(m) for segment in stack_of(context.model).segments for block in segment for m in block.modules()}
    sites = [s for s in attention_sites(context, method, ("self", "joint")) if id(s.module) in inside]
    if not sites:
        raise PatchError(f"{method}: no attention of {type(context.model).__name__} can be given other keys and values")
    kept = [s for s in sites if storage.layers is None or s.layer in storage.layers]
    unknown = set(storage.layers or ()) - {s.layer for s in sites}
    if unknown or not kept:
        count, named = sites[0].layers, sorted(unknown) or "none"
        raise PatchError(f"{method}: layers={storage.layers} names {named} of the {count} layers of "
                         f"{type(context.model).__name__}, which are 0 to {count - 1}")  # fmt: skip
    run.kv = KVRows(generation, storage, len(kept))
    if selector.mixes:
        run.beside = KVRows(generation, storage, len(kept))
    for number, site in enumerate(kept):
        bridge(context, method, site, attention(run, site, number))
    context.transaction.set(context.model, ACTIVE, run, method)
    context.transaction.wrap_forward(context.model, run)
    return run


def active_tokens(model: nn.Module) -> ActiveTokens | None:
    """The steps in part of a patched model, if it has any."""
    return model.__dict__.get(ACTIVE)


def activity(model: nn.Module) -> dict[str, Any]:
    """What the steps in part of a patched model were."""
    run = active_tokens(model)
    if run is None:
        return {}
    counts, at = run.counts, run.generation
    found: dict[str, Any] = {"computed": counts.dense, "in part": counts.partial}
    if counts.outside:
        found |= {"calls as without a patch": counts.outside, "since": counts.why_outside}
    if counts.all_tokens:
        found |= {"tokens in part": counts.tokens, "tokens in all": counts.all_tokens}  # of the calls in part
    for branch, line in counts.letters.items():
        found[f"steps {branch}".strip()] = "".join(line)
    found |= {
        "bytes held": run.nbytes + run.kv.nbytes + (0 if run.beside is None else run.beside.nbytes),
        "peak bytes": at.peak_bytes,
    }
    if counts.dense and not counts.partial:
        found["warning"] = "never computed anything in part"
        if run.selector.stale and not run.selector.static and not run.watched:
            found["warning"] += (
                ": no step of a solver was seen; a loop of your own shows it by "
                "`output = run.output(output, latents, sigma)`"
            )
    return found
