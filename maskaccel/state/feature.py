"""What a run remembers of one site: for each guidance branch, a history of each of its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .forecast import Forecaster, Hold
from .generation import Generation
from .history import History, Storage
from .ladder import Ladder


@dataclass(frozen=True)
class Pending:
    """A forecast that is not formed yet: adding it to the stream forms it in the same pass.

    Attributes:
        history: The values, `(B, N, D)` each.
        weights: One for each of them.
    """

    history: History
    weights: Sequence[float] | Tensor

    def value(self) -> Tensor:
        """The forecast itself."""
        return self.history.combine(self.weights)

    def fits(self, x: Tensor) -> bool:
        """Whether it can be added to x without changing its shape or dtype."""
        return self.history.of_kind(x)

    def added(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """`x + gate * forecast`, rounded once."""
        return self.history.combine(self.weights, x=x, gate=gate)

    def added_then_norm(
        self, x: Tensor, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, **norm: Any
    ) -> tuple[Tensor, Tensor]:
        """`added`, and its norm and modulation."""
        return self.history.combine_then_norm(self.weights, x, gate, scale, shift, **norm)


@dataclass
class Held:
    """What one guidance branch remembers.

    Attributes:
        key: Shapes, dtypes and devices of the input that the values belong to.
        form: How the caller puts the tensors together again.
        groups: Histories of each tensor (None where the site gives None), for all samples, or for each by itself.
        used: Last step at which it was written or read.
    """

    key: tuple
    form: Any
    groups: list[list[History | None]]
    used: int = -1
    extra: dict[str, Any] = field(default_factory=dict)


class Feature:
    """The memory of one site.

    A site that runs twice within one step of one branch has no single value to remember; from then on that branch
    computes until the run ends. That is the case of a guided model whose calls nobody names: nothing says which call is
    which.

    Attributes:
        resets: Times the memory was dropped because the input changed its shape, dtype or device within a run.
        refused: Times a branch was given up because it ran twice in a step.
    """

    def __init__(
        self,
        generation: Generation,
        forecaster: Forecaster | None = None,
        storage: Storage | None = None,
        *,
        per_sample: bool = False,
    ) -> None:
        if storage is not None and not isinstance(storage, Storage):
            raise TypeError(f"storage={storage!r} must be a maskaccel.state.Storage")
        if forecaster is not None and (isinstance(forecaster, type) or not hasattr(forecaster, "weights")):
            raise TypeError(
                f"forecaster={forecaster!r} must be one of maskaccel.state, such as Hold() or Taylor(order=1)"
            )
        self.generation, self.forecaster = generation, forecaster or Hold()
        self.storage, self.per_sample = storage or Storage(), per_sample
        self.resets = self.refused = 0
        self._held: dict[str, Held] = {}
        self._given_up: set[str] = set()
        generation.memories.append(self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model starts without the features of the original.
        return {**self.__dict__, "_held": {}, "_given_up": set()}

    def clear(self) -> None:
        """Forget every branch."""
        self._held.clear()
        self._given_up.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(h.nbytes for held in self._held.values() for group in held.groups for h in group if h is not None)

    def usable(self) -> bool:
        """Whether this call may remember anything at all."""
        return self.generation.active and not torch.is_grad_enabled()

    def find(self, key: tuple) -> Held | None:
        """What this branch remembers, if it fits the input and was not used at this step already."""
        if not self.usable():
            return None
        branch = self.generation.branch_key
        held = self._held.get(branch)
        if held is None:
            return None
        if held.key != key:
            self._reset()
            return None
        if held.used == self.generation.index:
            self._give_up(branch)
            return None
        return held

    def fits(self, x: Tensor) -> bool:
        """Whether this branch holds something of an input of the batch, tokens, dtype and device of x, not used yet."""
        held = self.peek() if self.usable() else None
        if held is None or held.used == self.generation.index:
            return False
        shape, dtype, device = held.key[0]
        return (shape[:2], dtype, device) == (x.shape[:2], x.dtype, x.device)

    def peek(self) -> Held | None:
        """What this branch remembers, whatever the input."""
        return self._held.get(self.generation.branch_key)

    def _reset(self) -> None:
        self.resets += 1
        self.generation.note(
            f"the batch, resolution or dtype changed at step {self.generation.index} of a run: memory dropped"
        )
        self._held.clear()

    def _give_up(self, branch: str) -> None:
        self.refused += 1
        self._given_up.add(branch)
        del self._held[branch]

    def store(
        self,
        key: tuple,
        tensors: Sequence[Tensor | None],
        *,
        form: Any = None,
        bases: Sequence[Tensor | None] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Held | None:
        """Remember tensors, or `tensor - base`, as of this step.

        Args:
            key: As in `find`.
            tensors: Values, batch first where the memory is per sample.
            form: Kept for the caller.
            bases: What to subtract from each.
            rows: Samples that were computed (per sample only; `tensors` and `bases` hold these alone); None is all.
        """
        branch, step = self.generation.branch_key, self.generation.index
        if not self.usable() or branch in self._given_up:
            return None
        held = self._held.get(branch)
        if held is not None and held.used == step and rows is None:
            self._give_up(branch)
            return None
        if held is not None and held.key != key:
            self._reset()
            held = None
        count = 1
        if self.per_sample:
            count = key[0][0][0]  # the batch
        if held is None or len(held.groups[0]) != len(tensors):
            capacity = self.forecaster.capacity
            kind = Ladder if getattr(self.forecaster, "ladder", False) else History
            groups: list[list[History | None]] = [
                [None if t is None else kind(capacity, self.storage) for t in tensors] for _ in range(count)
            ]
            held = self._held[branch] = Held(key, form, groups)
        held.used = step
        samples = range(count) if rows is None else rows
        for at, sample in enumerate(samples):
            for i, (history, tensor) in enumerate(zip(held.groups[sample], tensors, strict=True)):
                base = None if bases is None else bases[i]
                if history is None or tensor is None:
                    continue
                if self.per_sample:
                    tensor, base = tensor[at : at + 1], None if base is None else base[at : at + 1]
                history.push(tensor, step, base)
        self._check_bound()
        return held

    def _check_bound(self) -> None:
        limit = self.storage.max_bytes
        if limit is None:
            return
        total = sum(memory.nbytes for memory in self.generation.memories)
        if total > limit:
            raise ValueError(
                f"max_bytes={limit}, but the features of this model take {total} bytes so far; allow more, lower the "
                "order, or store them as Storage(dtype='fp8') or at a coarser level"
            )

    def forecast(
        self,
        held: Held,
        xs: Sequence[Tensor | None] | None = None,
        rows: Sequence[int] | None = None,
        *,
        own: bool = True,
        late: bool = False,
    ) -> list[Any]:
        """The value of each tensor at this step, added to `xs` where given.

        Args:
            held: What `find` gave.
            xs: Tensors to add to (of the samples in `rows`).
            rows: Samples wanted (per sample only); None is all.
            own: The caller may write to the result; without it, it may be a view of the memory.
            late: The caller takes a `Pending` for a sum that is not formed yet.
        """
        held.used = self.generation.index
        samples = range(len(held.groups)) if rows is None else rows
        out: list[Any] = []
        late = late and xs is None and not self.per_sample
        for i in range(len(held.groups[0])):
            x = None if xs is None else xs[i]
            parts: list[Any] = []  # one Pending, or tensors
            for at, sample in enumerate(samples):
                history = held.groups[sample][i]
                if history is None or not len(history):
                    continue
                one = x[at : at + 1] if x is not None and self.per_sample else x
                parts.append(self._forecast(history, one, own, late))
            out.append(None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts))
        return out

    def refresh(
        self,
        held: Held,
        fresh: Tensor,
        index: Tensor,
        labels: Tensor | None = None,
        gamma: float = 0.0,
        *,
        x: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> list[Tensor | None]:
        """Write tokens that were computed at this step into the newest value; then the forecast, the caller's to keep.

        Args:
            held: What `find` gave, of one tensor `(B, N, D)` for all samples.
            fresh: Values of these tokens, `(B, M, D)`.
            index: Which tokens, int64 `(B, M)`; equal ones have equal values.
            labels: Cluster of every token, `(B, N)`; with `gamma`, tokens take part in what is fresh of their cluster.
            gamma: Share that they take.
            x: Residual stream to add to, or None.
            gate: Gate of the values.
        """
        held.used = self.generation.index
        (history,) = held.groups[0]
        assert history is not None
        weights = self.forecaster.weights(history.stamps, self.generation.index, history)
        return [history.refresh(weights, fresh, index, labels, gamma, x=x, gate=gate)]

    def _forecast(self, history: History, x: Tensor | None, own: bool, late: bool) -> Tensor | Pending:
        weights = self.forecaster.weights(history.stamps, self.generation.index, history)
        if x is None and not isinstance(weights, Tensor) and weights[0] == 1.0 and not any(weights[1:]):
            return history.newest().clone() if own else history.newest()
        return Pending(history, weights) if late else history.combine(weights, x=x)


def key_of(*tensors: Tensor | None) -> tuple:
    """What has to stay the same for remembered values to fit."""
    return tuple(None if t is None else (t.shape, t.dtype, t.device) for t in tensors)
