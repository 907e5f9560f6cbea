"""FORA: fast-forward caching (Selvaraju et al. 2024, arXiv 2407.01425).

Attention and MLP outputs of every layer are computed on every N-th step and held in between; the adaLN gates are
always those of the current step: `x += gate_msa(t) * attn_cached`, `x += gate_mlp(t) * mlp_cached`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..masks import Schedule
from ..models import block_adapter
from ..models._adapter import children_of
from ..patching.patch import Context
from ..patching.transaction import PatchError
from ..state.generation import STATE, Generation
from ..state.site import SITE, Site, remember

# Children of blocks that no adapter describes, by the names that diffusers and the original DiT use.
_USUAL_SITES = ("attn", "attn1", "attn2", "ff", "ff_context", "mlp")


@dataclass(frozen=True)
class FORA:
    """Hold attention and MLP outputs between every `interval`-th step.

    Attributes:
        interval: Steps from one computation to the next (N in the paper); 1 computes always.
        first: Steps at the start that are computed (the paper computes the first).
        last: Steps at the end that are computed (the paper: none).
    """

    interval: int = 3
    first: int = 1
    last: int = 0

    name = "FORA"
    paper = "FORA: Fast-Forward Caching in Diffusion Transformer Acceleration (arXiv 2407.01425)"
    kind = "lossy"

    def __post_init__(self) -> None:
        self.schedule  # noqa: B018  (validates the fields when the method is made, not when it is used)

    @property
    def schedule(self) -> Schedule:
        """The step mask."""
        return Schedule(interval=self.interval, first=self.first, last=self.last)

    def attach(self, context: Context) -> None:
        """Plan a memory for the attention and MLP of every block."""
        blocks = [block for children in _block_lists(context.model) for block in children]
        generation: Generation | None = None
        for block in blocks:
            adapter = block_adapter(block)
            sites = children_of(block, adapter.sites if adapter is not None else _USUAL_SITES)
            if not sites:
                context.skip(self.name, block, f"it has no child named {', '.join(_USUAL_SITES)}")
            for module in sites:
                if generation is None:
                    generation = context.track_generation(self.name)
                    generation.schedules[self.name] = self.schedule
                remember(module, Site(generation, self.schedule), context.transaction, self.name)
                context.done(self.name, module, f"remembered in {type(block).__name__}")
        if not blocks:
            raise PatchError(f"{self.name}: {type(context.model).__name__} has no list of blocks (an nn.ModuleList)")

    def activity(self, model: nn.Module) -> dict[str, Any]:
        """Calls computed and reused, and bytes held now and at most."""
        sites: list[Site] = [m.__dict__[SITE] for m in model.modules() if SITE in m.__dict__]
        found: dict[str, Any] = {
            "computed": sum(s.computed for s in sites),
            "reused": sum(s.reused for s in sites),
            "resets": sum(s.resets for s in sites),
            "bytes held": sum(s.nbytes for s in sites),
            "peak bytes": model.__dict__[STATE].peak_bytes if STATE in model.__dict__ else 0,
        }
        if any(s.refused for s in sites):
            found["warning"] = (
                "the model ran several times a step in one guidance branch, where nothing can be reused; "
                "name the branches: `with run.branch(...)`"
            )
        elif found["computed"] and not found["reused"]:
            found["warning"] = "never reused anything"
        return found


def _block_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost module lists of the model that hold transformer blocks."""
    found: list[nn.ModuleList] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) and any(_looks_like_block(block) for block in child):
            found.append(child)
        elif not isinstance(child, nn.ModuleList):
            found += _block_lists(child)
    return found


def _looks_like_block(module: nn.Module) -> bool:
    return block_adapter(module) is not None or bool(children_of(module, _USUAL_SITES))
