"""What is known of the spans of a model: those that are planned, and the calls of each forward."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..masks import TokenIndex
from ._follow import Rows, kept_between
from .layout import TokenLayout

SPANS = "_maskaccel_spans"
_MARK = "_maskaccel_span_mark"  # attribute of a tensor that a checkpoint may save


@dataclass(eq=False)
class SpanCall:
    """One span in one forward of a model.

    Attributes:
        model: The model.
        number: Number of the span among those of the model, in the order in which they were attached.
        batch: Samples B.
        hidden: `(B, N, D)`, all latent tokens where the span is entered, without text; None once it is left.
        streams: The other streams there by name, such as the text.
        given: What the first block of the span was given, by name, streams left out.
        rows: How many rows the streams have, and of what.
        index: The tokens that run, of N; None while the controller has not chosen, and if it chose to run all.
        spread: Whether blocks of the span hand all N tokens on, because the model does something to them in between.
        held: What has been cut to the tokens already.
    """

    model: nn.Module
    number: int
    batch: int
    hidden: Tensor | None
    streams: dict[str, Tensor]
    given: dict[str, Any]
    rows: Rows
    index: TokenIndex | None = None
    spread: bool = False
    held: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        """All latent tokens, N."""
        return self.rows.tokens

    @property
    def grid(self) -> tuple[int, ...] | None:
        """The grid of the N latent tokens, or None if it is not known."""
        return self.rows.grid

    @property
    def text(self) -> int | None:
        """Number of text tokens in joint sequences; None where there are none, or it is not known."""
        return self.rows.text

    def restored(self, rows: Tensor) -> Tensor:
        """`hidden` with its kept rows replaced by `rows` `(B, K, D)`: dropped tokens bypass the span."""
        if self.index is None or self.hidden is None:
            raise RuntimeError("the span is not running on some of its tokens now")
        return self.index.merge(self.hidden, rows)

    def without_tensors(self) -> SpanCall:
        """The same, holding nothing but the index and what it says of the tokens."""
        light = copy.copy(self)
        light.hidden, light.streams, light.given, light.held = None, {}, {}, {}
        return light


class SpanController(Protocol):
    """Which tokens run in a span, and what the dropped ones are after it.

    Both methods are called outside of compiled graphs. Under activation checkpointing `choose` is called once for each
    forward, and `reenter` again in the recomputation, for the same call: it must then do the same.
    """

    def choose(self, call: SpanCall) -> TokenIndex | None:
        """The tokens that run, among `call.tokens`; None to run all of them."""

    def reenter(self, call: SpanCall, rows: Tensor) -> Tensor:
        """All latent tokens `(B, N, D)` after the span, of its kept ones `rows` `(B, K, D)`; see `call.restored`."""


@dataclass(eq=False)
class Span:
    """Blocks `start` to `end`, inclusive, and who decides about their tokens."""

    number: int
    method: str
    start: int
    end: int
    controller: SpanController


@dataclass(frozen=True)
class _Mark:
    """Where in its forward a tensor was given to a block.

    The record holds no tensors of streams: the marked tensor may be one of them.
    """

    record: dict[int, SpanCall]
    open: Mapping[int, SpanCall]


class _Local(threading.local):
    """What one thread knows of a model's spans. Recomputation may run in a thread of its own."""

    def __init__(self) -> None:
        self.record: dict[int, SpanCall] = {}  # every span that the forward has entered
        self.open: dict[int, SpanCall] = {}  # those that it has not left
        self.running: list[tuple[SpanCall, TokenIndex]] = []  # those of the block that runs now, outer ones first
        self.finished: list[SpanCall] = []
        self.gradients = False  # whether the model was called with gradients on


class ModelSpans:
    """The spans of one model.

    Attributes:
        model: The model.
        layout: What a call says of its tokens.
        spans: In the order in which they were attached.
        slow: Calls of blocks that ran once for each sample.
        spread: Whether this call of the model does something to all latent tokens between blocks.
    """

    def __init__(self, model: nn.Module, layout: TokenLayout) -> None:
        self.model, self.layout = model, layout
        self.spans: list[Span] = []
        self.slow = 0
        self.spread = False
        self._forget()

    def _forget(self) -> None:
        self.local = _Local()
        self._saved: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelSpans:
        new = memo[id(self)] = object.__new__(ModelSpans)
        kept = {name: value for name, value in vars(self).items() if name not in ("local", "_saved")}
        new.__dict__.update(copy.deepcopy(kept, memo))
        new._forget()
        return new

    def begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A call of the model begins."""
        local = self.local
        self.spread = kept_between(model, dict(zip(self.layout.names, args, strict=False)) | kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not self.replay(tensors):
            local.record, local.open, local.running, local.finished = {}, {}, [], []
            local.gradients = torch.is_grad_enabled()
        self.mark(tensors)

    # Outside of the graph where somebody compiles the whole model, as the wrappers of the blocks are.
    begin._torchdynamo_disable = True  # type: ignore[attr-defined]

    def mark(self, tensors: Sequence[Tensor]) -> None:
        """Note on tensors that a checkpoint may save where in the forward they are."""
        local = self.local
        if not _is_checkpointed(local.gradients):
            return
        mark = _Mark(local.record, dict(local.open))
        for tensor in tensors:
            setattr(tensor, _MARK, mark)
            if not torch.is_grad_enabled():  # a reentrant checkpoint comes back with another tensor of its storage
                self._saved[tensor.data_ptr()] = tensor

    def replay(self, tensors: Sequence[Tensor]) -> bool:
        """In a backward: go back to where in their forward these tensors were, if they say it."""
        if torch._C._current_graph_task_id() == -1:
            return False
        local = self.local
        for tensor in tensors:
            mark = getattr(tensor, _MARK, None) or getattr(self._saved.get(tensor.data_ptr()), _MARK, None)
            if mark is not None:
                local.record, local.open, local.running = mark.record, dict(mark.open), []
                local.gradients = True
                return True
        return False

    @contextmanager
    def running(self, call: SpanCall, index: TokenIndex, sample: int | None = None) -> Iterator[None]:
        """While a block runs on the tokens of an index, for all samples or for one of them."""
        layout = self.layout
        outer = layout.routed, layout.sample
        layout.routed, layout.sample = index, layout.sample if sample is None else sample
        self.local.running.append((call, index))
        try:
            yield
        finally:
            self.local.running.pop()
            layout.routed, layout.sample = outer


def _is_checkpointed(gradients: bool) -> bool:
    """Whether what runs now may be recomputed: checkpoints have hooks on saved tensors, reentrant ones no gradients."""
    if not torch.is_grad_enabled():
        return gradients
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def current_span(model: nn.Module) -> SpanCall | None:
    """The innermost span that the model runs in now in this thread; outside of one the last that it left, or None.

    A span that has been left keeps its `index` and what it says of the tokens, but no tensors of the streams.
    """
    state: ModelSpans | None = model.__dict__.get(SPANS)
    if state is None:
        return None
    local = state.local
    if local.running:
        return local.running[-1][0]
    calls = [call for call in local.open.values() if call.index is not None] or local.finished
    return calls[-1] if calls else None


def spans_of(model: nn.Module) -> list[SpanCall]:
    """The spans that the last forward of a model left, in this thread, in the order of their ends.

    Spans that ran on all tokens are left out.
    """
    state: ModelSpans | None = model.__dict__.get(SPANS)
    return [] if state is None else list(state.local.finished)


def span_activity(model: nn.Module) -> dict[str, Any]:
    """For the report: how many calls of blocks ran once for each sample."""
    state: ModelSpans | None = model.__dict__.get(SPANS)
    return {"block calls by sample (slower)": state.slow} if state is not None and state.slow else {}
