"""DuCa: dual feature caching (Zou et al. 2024, arXiv 2412.18911).

Between computed steps conservative and aggressive ones take turns: a conservative step is one of ToCa; an aggressive
one computes no block at all, and hands on again what the blocks handed on at the last step, computed or conservative.
Which tokens a conservative step computes matters little (the paper's second version): they are chosen at random, those
that were left out before first, so that no attention map is needed.

From the authors' code: that the first step after a computed one is conservative (its modulo by a changing cycle may
begin with an aggressive one); that an aggressive step hands on the hidden states themselves, not what the blocks add;
shares and cycles, which are ToCa's. Defaults are those for DiT with 50 DDIM steps, but for the random choice. Others:

    PixArt-alpha    ratio=0.75, bonus=0.4, cell=4, mlp=1.6, cross=0.6, step_weight=-0.9, layer_weight=0.6, drift=0.2,
                    dense=None
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..masks import Action, Whole
from ..patching.patch import Context
from . import _cached
from .toca import ToCa


@dataclass(frozen=True)
class DuCa(ToCa):
    """Compute some tokens, and no block at all, in turn between computed steps.

    Its fields are those of `ToCa`, with other defaults.
    """

    interval: int = 3
    ratio: float = 0.05
    score: str = "random"
    bonus: float = 0.8

    name = "DuCa"
    paper = "Accelerating Diffusion Transformers with Dual Feature Caching (arXiv 2412.18911)"
    between: ClassVar[tuple[Action, ...]] = ("partial", "reuse")

    def attach(self, context: Context) -> None:
        """Plan ToCa's memories, and one of what the blocks hand on.

        Raises:
            PatchError: As for `ToCa`, or the blocks of the model cannot be skipped.
        """
        _cached.attach_stack(self, context, Whole(self.schedule), storage=self.storage, adds=False)
        super().attach(context)
