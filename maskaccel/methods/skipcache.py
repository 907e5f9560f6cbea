"""Skip-Cache: the deep feature of one step serves the next ones (Chen et al. 2024, Skip-DiT, arXiv 2411.17616).

On a computed step the hidden states that enter block L-b are remembered. On the steps after it only blocks 0 to b-1
run, which feed the skip branches, and blocks L-b to L-1, on the remembered states (section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..masks import Schedule, Window
from ..ops._checks import count as check_count
from ..patching.patch import Context
from ..state.history import Storage
from . import _cached
from .skip_branches import BRANCH


@dataclass(frozen=True)
class SkipCache(_cached.CachedFeatures):
    """Run the outer blocks alone, between every `interval`-th step.

    A cached step replaces the stream that runs through the outer first blocks: without trained `SkipBranches` what they
    compute is lost, and this is a plain cache of the deep feature. The report says so.

    The authors' sampler may still reuse at the first step below `close`; here every step outside the window is
    computed.

    Attributes:
        interval: Steps from one computation to the next (N; the paper uses 2 to 6); 1 computes always.
        outer: Blocks at each end that always run (b): 4 of DiT-XL's 28.
        start: Largest timestep at which anything is reused: 1000 for DiT, 900 for Latte, 700 for HunyuanDiT.
        close: Smallest timestep at which anything is reused: 20 for DiT, 50 for Latte and HunyuanDiT. With 0 (and
            `start=1000`) the timesteps of the run are not needed.
        storage: How the feature is kept.
    """

    interval: int = 2
    outer: int = 4
    start: float = 1000.0
    close: float = 20.0
    storage: Storage = Storage()

    name = "SkipCache"
    paper = "Skip-DiT: Accelerating Vision Diffusion Transformers with Skip Branches (arXiv 2411.17616)"
    models = _cached.STACKS

    def __post_init__(self) -> None:
        close, start = self.close, self.start
        if not (isinstance(close, int | float) and isinstance(start, int | float) and 0 <= close < start <= 1000):
            raise ValueError(f"close={close!r} and start={start!r} must lie in 0 to 1000, close below start")
        self.rule  # noqa: B018  (validates the interval when the method is made)
        check_count("outer", self.outer, 1)

    @property
    def rule(self) -> Schedule | Window:
        """The step mask."""
        return Window.around(Schedule(interval=self.interval), self.close, self.start)

    def attach(self, context: Context) -> None:
        """Plan a memory of the hidden states between the outer blocks.

        Where the blocks fall into several segments (Flux), what each hands on is remembered.
        """
        _cached.attach_stack(
            self, context, self.rule, storage=self.storage, lead=self.outer, tail=self.outer, adds=False
        )  # fmt: skip

    def activity(self, model: nn.Module) -> dict[str, Any]:
        """Calls computed and reused, bytes held now and at most, and whether there are skip branches."""
        found = super().activity(model)
        if not any(BRANCH in module.__dict__ for module in model.modules()):
            found["skip branches"] = "none, so what the first blocks compute on cached steps is lost"
        return found
