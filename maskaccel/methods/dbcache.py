"""First-Block Cache (ParaAttention) and DBCache (cache-dit): the first blocks say whether the others may be reused.

The first `lead` blocks always run. If their residual moved little since the last computed step,
`mean|R - R_computed| / mean|R_computed| < threshold`, what the middle blocks added then is added again, and the last
`tail` blocks run on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..masks.signal import Signal
from ..ops._checks import count as check_count
from ..patching.patch import Context
from ..state.forecast import Forecaster, Hold
from ..state.history import Storage
from . import _cached


@dataclass(frozen=True)
class DBCache(_cached.CachedFeatures):
    """Reuse the middle blocks while the residual of the leading ones moves little.

    Attributes:
        threshold: Relative change below which the middle blocks are reused; 0 computes always.
        lead: Leading blocks that always run (F_n), 1 or more.
        tail: Trailing blocks that always run (B_n).
        first: Steps at the start that are computed.
        last: Steps at the end that are computed.
        max_consecutive: Most reused steps in a row; None is unlimited.
        max_reused: Most reused steps of a run; None is unlimited.
        forecaster: Of what the middle blocks add; `Hold()` is the last value, `Taylor()` DBCache with TaylorSeer.
        reduce: `"sample"` decides for every sample of a batch by itself; `"mean"` for the batch, `"any"` computes the
            batch if one sample has to be computed.
        storage: How features are kept.
    """

    threshold: float = 0.08
    lead: int = 8
    tail: int = 0
    first: int = 8
    last: int = 0
    max_consecutive: int | None = None
    max_reused: int | None = None
    forecaster: Forecaster = Hold()
    reduce: str = "sample"
    storage: Storage = Storage()

    name = "DBCache"
    paper = "DBCache: Dual Block Caching for Diffusion Transformers (cache-dit)"
    models = _cached.STACKS

    def __post_init__(self) -> None:
        self.signal  # noqa: B018  (validates the fields when the method is made)
        for name, low in (("lead", 1), ("tail", 0)):
            check_count(name, getattr(self, name), low)

    @property
    def signal(self) -> Signal:
        """The step mask."""
        return Signal(
            self.threshold, first=self.first, last=self.last, max_consecutive=self.max_consecutive,
            max_reused=self.max_reused, reduce=self.reduce,  # type: ignore[arg-type]
        )  # fmt: skip

    def attach(self, context: Context) -> None:
        """Plan a memory of what the middle blocks add."""
        _cached.attach_stack(
            self, context, self.signal, self.forecaster, self.storage, lead=self.lead, tail=self.tail
        )  # fmt: skip


@dataclass(frozen=True)
class FBCache(DBCache):
    """Reuse everything after the first block while that block's residual moves little.

    The attributes are those of `DBCache`, with one leading block and no trailing one.
    """

    threshold: float = 0.08
    lead: int = 1
    first: int = 1

    name = "FBCache"
    paper = "First-Block Cache (ParaAttention)"
