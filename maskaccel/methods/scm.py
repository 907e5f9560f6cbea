"""Steps computation masks (cache-dit): a fixed list of the steps that are computed, dense at the start.

The presets are runs of computed and reused steps for 28 steps; other numbers of steps stretch them in proportion.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..masks import Schedule
from ..masks.planned import Bins, Planned
from ..patching.patch import Context
from ..state.forecast import Forecaster, Hold
from ..state.history import Storage
from . import _cached

POLICIES = {
    "slow": Bins((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "medium": Bins((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "fast": Bins((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "ultra": Bins((4, 1, 1, 1, 1), (2, 5, 6, 7)),
}


@dataclass(frozen=True)
class SCM(_cached.CachedFeatures):
    """Reuse what all blocks add at the steps that a mask leaves out.

    Attributes:
        policy: `"slow"`, `"medium"`, `"fast"`, `"ultra"`, or a mask of your own: a tuple with 1 (compute) or 0 for each
            step, or a rule, such as `masks.dynamic.Dynamic`.
        forecaster: Of what the blocks add; `Hold()` is the last value, `Taylor()` extrapolates.
        storage: How features are kept.
    """

    policy: str | tuple[int | bool, ...] | Planned = "medium"
    forecaster: Forecaster = Hold()
    storage: Storage = Storage()

    name = "SCM"
    paper = "Steps Computation Mask (cache-dit)"
    models = _cached.STACKS

    def __post_init__(self) -> None:
        self.schedule  # noqa: B018  (validates the fields when the method is made)

    @property
    def schedule(self) -> Planned | Schedule:
        """The step mask."""
        if isinstance(self.policy, Planned):
            return self.policy
        if isinstance(self.policy, str):
            if self.policy not in POLICIES:
                raise ValueError(f"policy={self.policy!r}; allowed are {', '.join(POLICIES)} or a tuple of 0 and 1")
            return POLICIES[self.policy]
        if not isinstance(self.policy, tuple) or any(c not in (0, 1) for c in self.policy):
            raise ValueError(f"policy={self.policy!r} must be a name or a tuple of 0 and 1, one a step")
        return Schedule.from_mask(self.policy)

    def attach(self, context: Context) -> None:
        """Plan a memory of what all blocks add."""
        _cached.attach_stack(self, context, self.schedule, self.forecaster, self.storage)
