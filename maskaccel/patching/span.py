"""A span of a model's blocks on some of its latent tokens.

Whoever drops tokens (routes of training, partial steps of sampling) decides two things: which tokens run in a span of
blocks, and what the dropped ones are where the span ends. It says so as a `SpanController`; all the rest is here. The
kept rows are gathered where the span is entered, text rows stay, whatever else a block is given for each token follows
(rotary tables, per-token modulation, masks), and the controller puts the dropped rows back where the span is left.

One forward of the model has one `SpanCall` for each span. Recomputation under activation checkpointing finds the call
of its own forward through the tensors that the checkpoint saved, so several forwards may be alive before a backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import TokenIndex
from ..models import Streams, stack_of, streams_of
from ..models._per_sample import NeedsSamples
from ..models._streams import parameters_of
from ._follow import Follower, Rows, sample_of, span_refusal
from ._spans import SPANS, ModelSpans, Span, SpanCall, SpanController, current_span, span_activity, spans_of
from .attention import layout_of
from .order import OrderedBlock
from .patch import Context
from .transaction import PatchError


def attach_span(context: Context, method: str, start: int, end: int, controller: SpanController) -> Span:
    """Plan that a span of a model's blocks runs on the tokens that a controller chooses.

    Spans of one model may follow each other, and one may be inside another: its tokens are then those that the outer
    one kept.

    Args:
        context: The model.
        method: On whose behalf.
        start: First block of the span, counted over the whole stack of blocks in the order of execution, from 0;
            negative numbers count from the end.
        end: Last block of the span, inclusive, likewise.
        controller: Chooses the tokens and puts the dropped ones back. It is copied with the model.

    Returns:
        The span, with `start` and `end` counted from 0.

    Raises:
        ValueError: The model has no such blocks, or `end` is before `start`.
        PatchError: The blocks cannot run on some of the tokens (they need the whole grid, or it is not known which
            rows are theirs), or the span overlaps another one without being inside it or around it.
    """
    model = context.model
    blocks, names = _blocks_of(model, method)
    first, last = _bounds(f"{method}: ", start, end, len(blocks))
    why = span_refusal(model, blocks[first : last + 1], names[first : last + 1])
    if why is not None:
        kind = type(model).__name__
        raise PatchError(f"{method}: blocks {first} to {last} of {kind} cannot run on some of the tokens: {why}")
    state, wrappers = _planned(context, method)
    for other in state.spans:
        apart = last < other.start or other.end < first
        nested = (other.start <= first and last <= other.end) or (first <= other.start and other.end <= last)
        if not apart and not nested:
            raise PatchError(
                f"{method}: blocks {first} to {last} overlap blocks {other.start} to {other.end} of {other.method}; "
                "spans must be apart, or one inside the other"
            )
    span = Span(len(state.spans), method, first, last, controller)
    state.spans.append(span)
    for number in range(last + 1):
        if number not in wrappers:
            wrappers[number] = SpanBlock(state, number)
            # Around whatever skips blocks, and inside of what puts all tokens of the model in another order.
            context.transaction.wrap_forward(blocks[number], wrappers[number], outermost=True, below=OrderedBlock)
        if number >= first:
            wrappers[number].add(span)
            context.done(method, blocks[number], "block in a span of some tokens")
    return span


def _blocks_of(model: nn.Module, method: str) -> tuple[list[nn.Module], list[str]]:
    try:
        stack = stack_of(model)
    except LookupError as error:
        raise PatchError(f"{method}: {error}") from error
    segments = zip(stack.segments, stack.names, strict=True)
    pairs = [pair for blocks, names in segments for pair in zip(blocks, names, strict=True)]
    return [block for block, _ in pairs], [name for _, name in pairs]


def blocks_left(context: Context, method: str, name: str, taken: int) -> None:
    """Refuse a model that has no block for the span beside those that a method takes.

    Args:
        context: The model.
        method: On whose behalf.
        name: The method's argument that says how many blocks it takes.
        taken: Its value.

    Raises:
        ValueError: The model has no more blocks than that.
    """
    depth = len(_blocks_of(context.model, method)[0])
    if taken >= depth:
        kind = type(context.model).__name__
        raise ValueError(f"{method}: {name}={taken}; {kind} has {depth} blocks: allowed are 1 to {depth - 1}")


def _bounds(method: str, start: int, end: int, depth: int) -> tuple[int, int]:
    found = []
    for name, value in (("start", start), ("end", end)):
        if isinstance(value, bool) or not isinstance(value, int) or not -depth <= value < depth:
            raise ValueError(
                f"{method}{name}={value!r}; the model has {depth} blocks: allowed are {-depth} to {depth - 1}"
            )
        found.append(value % depth)
    if found[1] < found[0]:
        raise ValueError(
            f"{method}end={end} is block {found[1]} of {depth}, before start={start}, which is block {found[0]}"
        )
    return found[0], found[1]


def _planned(context: Context, method: str) -> tuple[ModelSpans, dict[int, SpanBlock]]:
    """The spans of a model that is being patched, and the wrappers of its blocks."""
    planned = context.__dict__.get(SPANS)
    if planned is None:
        layout, transaction = layout_of(context), context.transaction
        state = ModelSpans(context.model, layout)
        planned = context.__dict__[SPANS] = state, {}
        transaction.set(context.model, SPANS, state, method)
        transaction.pre_hook(context.model, layout.read)
        transaction.pre_hook(context.model, state.begin)
    return planned


# ------------------------------------------------------------------------------------------------------ the blocks


class SpanBlock:
    """One block in a span or before one, as a wrapper of its forward."""

    def __init__(self, state: ModelSpans, number: int) -> None:
        self.state, self.number = state, number
        self.spans: list[Span] = []  # outer ones first

    def add(self, span: Span) -> None:
        """The block is in this span."""
        self.spans.append(span)
        self.spans.sort(key=lambda one: (one.start - one.end, one.number))

    def __call__(self, block: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """A call of the block; `inner` is the block itself, or what else stands before it."""
        streams = streams_of(block)
        hidden = streams.take(args, kwargs)[0]
        if hidden is None:
            return inner(*args, **kwargs)
        self.state.replay([hidden])
        self.state.mark([hidden])
        for span in reversed(self.spans):
            inner = functools.partial(self.run, span, block, streams, inner)
        return inner(*args, **kwargs)

    def run(
        self, span: Span, block: nn.Module, streams: Streams, inner: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """The block in one of its spans; `inner` is the next span, and at last the block itself."""
        local, values = self.state.local, streams.take(args, kwargs)
        if self.number == span.start:
            local.open[span.number] = self.enter(span, block, streams, args, kwargs)
        call = local.open.get(span.number)
        if call is None:
            raise RuntimeError(
                f"{span.method}: block {self.number} of blocks {span.start} to {span.end} runs without those before "
                "it, or is recomputed from tensors that something has put in place of what the checkpoint saved"
            )
        hidden, rows, index = values[0], call.rows, call.index
        assert hidden is not None
        if index is None:
            if self.number == span.end:
                self.close(span, call)
            return inner(*args, **kwargs)
        if self.number == span.start or call.spread:
            hidden = index.shift(*rows.beside(span.method, hidden, rows.tokens)).gather(hidden)
        elif span is self.spans[-1] or self.spans[self.spans.index(span) + 1].start == self.number:
            rows.beside(span.method, hidden, index.kept)  # inside of an inner span it has the rows of that one
        output = self.on_rows(span, call, block, streams, inner, (hidden, *values[1:]), args, kwargs)
        return self.leave(span, call, streams, output) if self.number == span.end or call.spread else output

    def enter(self, span: Span, block: nn.Module, streams: Streams, args: tuple, kwargs: dict[str, Any]) -> SpanCall:
        """The span begins: which tokens run in it. In a recomputation they are the same again."""
        local, layout = self.state.local, self.state.layout
        first, *rest = streams.take(args, kwargs)
        assert first is not None
        if layout.order is not None:
            raise ValueError(
                f"{span.method}: another method runs the blocks with their tokens in the order of patches, so it "
                "cannot be told which tokens are kept; use one of them"
            )
        others = {n: v for n, v in zip(streams.inputs[1:], rest, strict=True) if v is not None}
        outer = (local.running[-1][1], local.running[-1][0].rows) if local.running else None
        rows = Rows.of(span.method, layout, first, others, outer)
        given = {name: v for name, v in _named(block, args, kwargs).items() if name not in streams.inputs}
        call = SpanCall(self.state.model, span.number, rows.batch, rows.latents(first), others, given, rows)
        call.spread = self.state.spread
        known = local.record.get(span.number)
        if known is not None:
            call.index = known.index
            return call
        index = span.controller.choose(call)
        if index is not None:
            _check_index(span.method, index, rows)
            call.index = index if index.keep.device == first.device else index.to(first.device)
        local.record[span.number] = call.without_tensors()
        return call

    def on_rows(
        self, span: Span, call: SpanCall, block: nn.Module, streams: Streams, inner: Callable[..., Any],
        values: Sequence[Tensor | None], args: tuple, kwargs: dict[str, Any],
    ) -> Any:  # fmt: skip
        """The block on the kept rows, with what else it is given cut to them."""
        state, rows, index = self.state, call.rows, call.index
        assert index is not None
        follow = Follower(span.method, rows, index, call.held, block)
        try:
            cut = _replaced(block, streams, args, kwargs, values, follow.cut)
            with state.running(call, index):
                return inner(*cut[0], **cut[1])
        except NeedsSamples:
            return self.by_sample(span, call, block, streams, inner, values, args, kwargs)

    def by_sample(
        self, span: Span, call: SpanCall, block: nn.Module, streams: Streams, inner: Callable[..., Any],
        values: Sequence[Tensor | None], args: tuple, kwargs: dict[str, Any],
    ) -> Any:  # fmt: skip
        """The same for one sample after the other, each with tables of its own tokens."""
        state, rows, index = self.state, call.rows, call.index
        assert index is not None
        state.slow += 1
        found = []
        for sample in range(rows.batch):
            part = index.part(slice(sample, sample + 1))
            follow = Follower(span.method, rows, part)

            def cut(name: str, value: Any, sample: int = sample, follow: Follower = follow) -> Any:
                return follow.cut(name, sample_of(name, value, sample, rows))

            mine = [None if value is None else value[sample : sample + 1] for value in values]
            given, named = _replaced(block, streams, args, kwargs, mine, cut)
            with state.running(call, part, sample):
                found.append(streams.read(inner(*given, **named)))
            if any(value is not None and value.shape[0] != 1 for value in found[-1]):
                raise ValueError(
                    f"{span.method}: {type(block).__name__} returns more than one sample for one of them: something "
                    "that it is given has rows for all samples in a form that is not known"
                )
        return streams.give([None if parts[0] is None else torch.cat(parts) for parts in zip(*found, strict=True)])

    def leave(self, span: Span, call: SpanCall, streams: Streams, output: Any) -> Any:
        """All latent tokens again: for good at the end of the span, else until the next block."""
        found = list(streams.read(output))
        first, index = found[0], call.index
        assert first is not None
        assert index is not None
        prefix, suffix = call.rows.beside(span.method, first, index.kept)
        stop = first.shape[1] - suffix
        latents = first[:, prefix:stop] if prefix or suffix else first
        if self.number != span.end:
            full = call.restored(latents)
        else:
            full = self.reentered(span, call, latents)
            self.close(span, call)
        parts = [part for part in (first[:, :prefix], full, first[:, stop:]) if part.shape[1]]
        found[0] = torch.cat(parts, 1) if len(parts) > 1 else full
        return streams.give(found)

    def reentered(self, span: Span, call: SpanCall, latents: Tensor) -> Tensor:
        """What the controller makes of the kept rows."""
        reentrant = self.state.local.gradients and not torch.is_grad_enabled()
        if reentrant and call.hidden is not None and call.hidden.requires_grad and span.start != span.end:
            raise RuntimeError(
                f"{span.method}: block {self.number}, the last of the span, is under a reentrant checkpoint, which "
                "would give the dropped tokens no gradient; checkpoint it with use_reentrant=False"
            )
        full = span.controller.reenter(call, latents)
        expected = (call.batch, call.rows.tokens, latents.shape[2])
        if tuple(full.shape) != expected:
            raise ValueError(f"{span.method}: reenter returned shape {tuple(full.shape)}; it must be {expected}")
        return full

    def close(self, span: Span, call: SpanCall) -> None:
        """The span has been left."""
        local = self.state.local
        local.open.pop(span.number, None)
        if call.index is not None:
            local.finished.append(call.without_tensors())


def _named(block: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a block by name; surplus positional ones by their number."""
    names = parameters_of(type(block))
    return {names[i] if i < len(names) else str(i): value for i, value in enumerate(args)} | dict(kwargs)


def _replaced(
    block: nn.Module, streams: Streams, args: tuple, kwargs: Mapping[str, Any], values: Sequence[Tensor | None],
    cut: Callable[[str, Any], Any],
) -> tuple[list, dict[str, Any]]:  # fmt: skip
    """The arguments of a block with its streams replaced, and everything else cut."""
    new = dict(zip(streams.inputs, values, strict=True))
    named = _named(block, args, kwargs).items()
    found = [(name, new[name] if name in new else cut(name, value)) for name, value in named]
    return [value for _, value in found[: len(args)]], dict(found[len(args) :])


def _check_index(method: str, index: Any, rows: Rows) -> None:
    if not isinstance(index, TokenIndex):
        raise TypeError(f"{method}: choose returned a {type(index).__name__}; it must be a TokenIndex or None")
    if index.n != rows.tokens or index.batch not in (1, rows.batch):
        raise ValueError(
            f"{method}: the index chosen is of {index.n} tokens and a batch of {index.batch}; the span has "
            f"{rows.tokens} latent tokens and a batch of {rows.batch}"
        )
    if index.counts is not None:
        raise ValueError(f"{method}: the index chosen is ragged (it has counts); samples of a span keep equal numbers")


__all__ = ["Span", "SpanCall", "SpanController", "attach_span", "current_span", "span_activity", "spans_of"]
