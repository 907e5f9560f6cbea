"""A run of transformer blocks whose change of the residual stream is remembered.

Blocks are wrapped one by one, and the model's own loop stays: on a reused step the blocks of a segment hand on what
they are given, and its last block returns the segment's input plus the forecast of `output - input`. So whatever the
model does around its blocks (embeddings, control residuals, splitting and joining streams) is done as always.

Stack, segment and block level are one thing: a segment of all blocks, of some, or of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..masks.schedule import Action, StepRule
from ..masks.signal import Signal, SignalState
from ..models import Streams
from ..ops import relative_difference
from ..patching.transaction import Transaction
from ._rows import slice_batch
from .feature import Feature, Held, key_of
from .forecast import Forecaster
from .generation import Generation
from .history import Storage

ROLE = "_maskaccel_stack"


# The feature that a signal watches, `(B, ...)`, as a function of the first block and its arguments.
Tap = Callable[[nn.Module, tuple, dict[str, Any]], Tensor]


@dataclass
class Segment:
    """Consecutive blocks that are skipped together.

    Attributes:
        blocks: In the order in which the model runs them.
        streams: How each block takes and returns the tensors of the stack.
        feature: Memory of what the segment adds to each stream, or of what it hands on.
        adds: Whether the memory is of `output - input`; else of the output itself.
    """

    blocks: list[nn.Module]
    streams: list[Streams]
    feature: Feature
    adds: bool = True


@dataclass
class _Visit:
    """One call of the model."""

    computes: list[bool] | bool | None = None  # None: not decided yet; a list is one entry a sample
    start: tuple[Tensor | None, ...] = ()  # streams before the leading blocks
    bases: tuple[Tensor | None, ...] = ()  # streams before the segment at hand
    versions: tuple[int, ...] = ()
    held: Held | None = None
    result: list[Tensor | None] | None = None
    rows: list[int] | None = None  # the samples that are computed, where not all are
    merged: bool = False  # all samples run through the blocks, and the results are merged


@dataclass
class _Watch:
    """What a signal remembers of one guidance branch."""

    state: SignalState = field(default_factory=SignalState)
    feature: Tensor | None = None


class Stack:
    """Segments that are computed or reused together.

    Attributes:
        computed: Model calls that computed the segments (of all samples, or of some).
        reused: Model calls that reused them.
        actions: Letter by step of the run at hand or the last one, and branch: C computed, `.` reused, m some samples.
    """

    def __init__(
        self,
        generation: Generation,
        segments: Sequence[tuple[Sequence[nn.Module], Sequence[Streams]]],
        rule: StepRule,
        forecaster: Forecaster | None = None,
        storage: Storage | None = None,
        *,
        lead: Sequence[tuple[nn.Module, Streams]] = (),
        tap: Tap | None = None,
        group: Any = None,
        adds: bool = True,
    ) -> None:
        """Make a stack.

        Args:
            generation: The model's run.
            segments: Blocks and their streams, segment by segment.
            rule: A step mask, or a `Signal`.
            forecaster: Of the remembered change.
            storage: Of the remembered change.
            lead: Blocks before the first segment that always run; their change of the first stream is what a signal
                watches unless it has a tap.
            tap: What a signal watches instead.
            group: Process group over which a signal's sums are added, where ranks share one sequence.
            adds: Remember what the segments add to their input; without it, what they hand on.
        """
        self.generation, self.rule, self.tap, self.group = generation, rule, tap, group
        self.signal = rule if isinstance(rule, Signal) else None
        per_sample = self.signal is not None and self.signal.reduce == "sample"
        per_sample = per_sample or getattr(forecaster, "per_sample", False)
        self.segments = [
            Segment(list(blocks), list(streams), Feature(generation, forecaster, storage, per_sample=per_sample), adds)
            for blocks, streams in segments
        ]
        self.lead = list(lead)
        self.computed = self.reused = self.mixed = 0
        self.actions: dict[str, list[str]] = {}
        self._watches: dict[str, _Watch] = {}
        self._visit = _Visit()
        self._run = -1
        generation.memories.append(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watches": {}, "_visit": _Visit(), "actions": {}}

    @property
    def nbytes(self) -> int:
        """Bytes that the signal holds; those of the features are counted by themselves."""
        return sum(w.feature.nbytes for w in self._watches.values() if w.feature is not None)

    def clear(self) -> None:
        """Forget what the signal remembers."""
        self._watches.clear()
        self._visit = _Visit()

    def attach(self, transaction: Transaction, claimant: str) -> None:
        """Plan the wrappers of all blocks."""
        for i, (block, streams) in enumerate(self.lead):
            _wrap(
                block, _Role(self, "lead", streams, opens=i == 0, last=i == len(self.lead) - 1), transaction, claimant
            )
        for number, segment in enumerate(self.segments):
            for i, (block, streams) in enumerate(zip(segment.blocks, segment.streams, strict=True)):
                opens = number == 0 and i == 0 and not self.lead
                role = _Role(self, "body", streams, segment, opens, i == 0, i == len(segment.blocks) - 1)
                _wrap(block, role, transaction, claimant)

    # ----------------------------------------------------------------------------------------------- one call
    def run(self, role: _Role, block: nn.Module, inner: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The call of a wrapped block."""
        if not self.generation.active or torch.is_grad_enabled():
            return inner(*args, **kwargs)
        if role.opens:
            self._visit = _Visit(start=role.streams.take(args, kwargs))
            if self.tap is not None or role.kind == "body":
                self._decide(block, args, kwargs, None)
        if role.kind == "lead":
            output = inner(*args, **kwargs)
            if role.last and self._visit.computes is None:
                self._decide(block, args, kwargs, role.streams.read(output)[0])
            return output
        return self._body(role, inner, args, kwargs)

    def _body(self, role: _Role, inner: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        visit, segment, streams = self._visit, role.segment, role.streams
        assert segment is not None
        if role.first:
            self._enter(segment, streams.take(args, kwargs))
            if segment is self.segments[0]:
                self._count()
        if visit.result is not None and visit.rows is None:  # every sample is reused
            return streams.give(visit.result if role.last else streams.take(args, kwargs))
        if visit.rows is None or visit.merged:
            output = inner(*args, **kwargs)
            return output if not role.last else self._leave(segment, streams, output)
        return self._some(role, segment, inner, args, kwargs)

    def _enter(self, segment: Segment, bases: tuple[Tensor | None, ...]) -> None:
        """Before the first block of a segment: what is reused is forecast here, before a model can write to `bases`."""
        visit = self._visit
        visit.bases, visit.held, visit.result, visit.rows, visit.merged = bases, None, None, None, False
        computes = visit.computes
        if computes is not True and (computes is False or not all(computes or [True])):
            visit.held = segment.feature.find(key_of(*bases))
        if visit.held is None:
            if segment.adds:
                visit.bases, visit.versions = _guarded(bases)
            return
        samples = None if computes is False else [i for i, c in enumerate(computes) if not c]  # type: ignore[arg-type]
        if samples is None or len(samples) == len(computes):  # type: ignore[arg-type]
            visit.result = segment.feature.forecast(visit.held, bases if segment.adds else None)
            return
        visit.rows = [i for i, c in enumerate(computes) if c]  # type: ignore[arg-type]
        picked = [None if b is None else b[samples] for b in bases]
        visit.result = segment.feature.forecast(visit.held, picked if segment.adds else None, samples)
        visit.bases, visit.versions = _guarded(bases)

    def _leave(self, segment: Segment, streams: Streams, output: Any) -> Any:
        """After the last block of a computed segment."""
        visit = self._visit
        after = streams.read(output)
        if segment.adds and visit.versions != _versions(visit.bases):
            # A block writes to its input: the change cannot be formed any more. Compute until a copy is kept.
            self.generation.note("a block writes to its input in place, so its change is not remembered")
            return output
        if visit.rows is None:
            segment.feature.store(key_of(*visit.bases), after, bases=visit.bases if segment.adds else None)
            return output
        rows = visit.rows
        index = torch.tensor(rows, device=_first(after).device)
        fresh = [None if t is None else t[index] for t in after]
        bases = [None if b is None else b[index] for b in visit.bases] if segment.adds else None
        segment.feature.store(key_of(*visit.bases), fresh, bases=bases, rows=rows)
        return streams.give(self._with_reused(after))

    def _with_reused(self, values: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Full batch values, with the forecast of the samples that are reused in their rows."""
        visit = self._visit
        assert visit.rows is not None and visit.result is not None
        computed = set(visit.rows)
        first = _first(values)
        index = torch.tensor([i for i in range(first.shape[0]) if i not in computed], device=first.device)
        return [
            None if v is None or r is None else v.index_copy(0, index, r.to(v.dtype))
            for v, r in zip(values, visit.result, strict=True)
        ]

    def _some(
        self, role: _Role, segment: Segment, inner: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """A block on the samples that are computed; the others pass through."""
        visit, streams = self._visit, role.streams
        assert visit.rows is not None
        full = streams.take(args, kwargs)
        picked = slice_batch(args, kwargs, full, visit.rows)
        if picked is None:  # some argument does not say which rows belong to which sample
            visit.merged = True
            output = inner(*args, **kwargs)
            return output if not role.last else self._leave(segment, streams, output)
        after = streams.read(inner(*picked[0], **picked[1]))
        index = torch.tensor(visit.rows, device=_first(full).device)
        whole = [
            None if f is None or a is None else f.index_copy(0, index, a.to(f.dtype))
            for f, a in zip(full, after, strict=True)
        ]
        output = streams.give(whole)
        return output if not role.last else self._leave(segment, streams, output)

    # ----------------------------------------------------------------------------------------------- decisions
    def _decide(self, block: nn.Module, args: tuple, kwargs: dict[str, Any], after: Tensor | None) -> None:
        visit, action = self._visit, self.rule.action(self.generation)
        if self.signal is None:
            visit.computes = action == "compute"
        else:
            visit.computes = self._watch(self.signal, action, block, args, kwargs, after)

    def _watch(
        self, signal: Signal, action: Action, block: nn.Module, args: tuple, kwargs: dict, after: Tensor | None
    ) -> list[bool] | bool:
        """The decision of a signal for each sample."""
        watch = self._watches.setdefault(self.generation.branch_key, _Watch())
        start = self._visit.start[0]
        assert start is not None
        moved, new = None, False  # the sums, where the tap gives them in its own pass
        if self.tap is not None:
            against, base = getattr(self.tap, "against", None), None
            if against is None or watch.feature is None:
                value = self.tap(block, args, kwargs)
            else:
                value, moved = against(block, args, kwargs, watch.feature)
                new = moved is not None  # nobody else holds it
        else:
            assert after is not None
            value, base = after, start
        samples = start.shape[0]
        before = watch.feature if watch.feature is not None and _alike(watch.feature, value) else None
        forced = action == "compute" or before is None
        if forced and signal.reference == "computed":
            sums: list[list[float]] = [[0.0, 0.0]] * samples
        else:
            if moved is None:
                moved = relative_difference(value, value if before is None else before, base=base)
            sums = self._on_host(moved, samples)
        computes = signal.judge(sums, watch.state, forced)
        if all(computes) or signal.reference == "previous":
            watch.feature = value if new else _copied(watch.feature, value, base)
        elif any(computes):
            assert watch.feature is not None
            index = torch.tensor([i for i, c in enumerate(computes) if c], device=value.device)
            rows = value[index] if base is None else value[index] - base[index]
            watch.feature.index_copy_(0, index, rows)
        return True if all(computes) else False if not any(computes) else computes

    def _on_host(self, sums: Tensor, samples: int) -> list[list[float]]:
        if self.group is not None:
            torch.distributed.all_reduce(sums, group=self.group)
        found = sums.tolist()
        return found if len(found) == samples else [[sum(s[0] for s in found), sum(s[1] for s in found)]] * samples

    def _count(self) -> None:
        """Note what becomes of this call; nothing remembered means that it is computed, whatever the rule says."""
        if self._run != self.generation.run:
            self._run, self.actions = self.generation.run, {}
        letter = "C" if self._visit.result is None else "." if self._visit.rows is None else "m"
        line = self.actions.setdefault(self.generation.branch_key, [])
        line += [" "] * (self.generation.index - len(line)) + [letter]
        self.computed += letter == "C"
        self.reused += letter == "."
        self.mixed += letter == "m"


@dataclass
class _Role:
    """What a block is in a stack."""

    stack: Stack
    kind: str  # "lead" always runs; "body" belongs to a segment
    streams: Streams
    segment: Segment | None = None
    opens: bool = False  # the first block of the model's call
    first: bool = False  # of its segment
    last: bool = False  # of its segment, or of the leading blocks


def _wrap(block: nn.Module, role: _Role, transaction: Transaction, claimant: str) -> None:
    transaction.set(block, ROLE, role, claimant)
    transaction.wrap_forward(block, _stacked_forward)


def _stacked_forward(self: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    role: _Role = self.__dict__[ROLE]
    return role.stack.run(role, self, inner, args, kwargs)


def _first(values: Sequence[Tensor | None]) -> Tensor:
    return next(value for value in values if value is not None)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _copied(held: Tensor | None, value: Tensor, base: Tensor | None) -> Tensor:
    """A copy of the feature, in the memory of the old one where it fits."""
    reusable = held is not None and _alike(held, value) and held.is_inference() == torch.is_inference_mode_enabled()
    if base is None:
        return held.copy_(value) if reusable else value.clone()  # type: ignore[union-attr]
    return torch.sub(value, base, out=held) if reusable else value - base


def _versions(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(0 if t is None or t.is_inference() else t._version for t in tensors)


def _guarded(bases: tuple[Tensor | None, ...]) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """The tensors with the means to see that somebody wrote to them; copies where there are none (inference mode)."""
    kept = tuple(b.clone() if b is not None and b.is_inference() else b for b in bases)
    return kept, _versions(kept)
