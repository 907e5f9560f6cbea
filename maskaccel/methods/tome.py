"""ToMe: token merging in attention (Bolya et al. 2023, arXiv 2210.09461; for diffusion 2303.17604; for DiTs DiT4Edit).

Of each cell of the grid one token is a destination, the others are sources. Each source looks for the destination with
the most similar key; the `ratio * N` sources with the highest similarity are averaged into theirs, attention runs on
what is left, and every merged token takes the result of its destination. DiT4Edit (arXiv 2411.03286) merges patches of
DiTs in this way while it edits.

Queries, keys and values are merged where they arrive at the attention function: their projections are linear, so this
is what merging their input gives, and with QK norm or rotary embedding it is the mean of what attention would have
read. Text is never merged. It costs one pass over queries, keys and values, and saves of the attention `1 - (1 - r)^2`;
the projections are as before.

From the authors' code for diffusion: cells of 2 x 2, half of the tokens merged, destinations drawn anew at every step
and layer (here from a counter-based generator, so that runs of one seed are equal), no weighting of attention by the
number of merged tokens. As in the first paper the similarity is that of keys; the code for diffusion takes the block's
normalised input.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import match_tokens, merge_tokens, unmerge_tokens
from ..ops._checks import count as check_count
from ..patching.attention import AttentionCall, attention_sites, bridge
from ..patching.patch import Context
from ..state.generation import Generation
from ._active import check_number

POLICY = "_maskaccel_tome"


@dataclass(frozen=True)
class ToMe:
    """Merge similar tokens before attention, and give all of them its result.

    Attributes:
        ratio: Share of the latent tokens that are merged into others, 0 to below 1; at most those that are no
            destination.
        cell: Rows and columns of a cell with one destination; frames are apart.
        dense_layers: The first layers whose attention stays as it is.
        seed: Of the destinations.
        grid: Grid of the latent tokens where the model does not tell it.
    """

    ratio: float = 0.5
    cell: tuple[int, int] = (2, 2)
    dense_layers: int = 0
    seed: int = 0
    grid: tuple[int, ...] | None = None

    kind = "lossy"
    name = "ToMe"
    paper = "Token Merging for Fast Stable Diffusion (arXiv 2303.17604); DiT4Edit (arXiv 2411.03286)"
    models = "any model with softmax attention through torch or diffusers' dispatch"

    def __post_init__(self) -> None:
        check_number(self, "ratio", 0, 1)
        if self.ratio == 1:
            raise ValueError("ratio=1 would merge every token; give a share below 1")
        cell = self.cell
        if not isinstance(cell, tuple) or len(cell) != 2 or any(type(n) is not int or n < 1 for n in cell):
            raise ValueError(f"cell={cell!r} must be two integers, 1 or more")
        if cell == (1, 1):
            raise ValueError("cell=(1, 1) leaves nothing to merge")
        most = 1 - 1 / (cell[0] * cell[1])
        if self.ratio > most:
            raise ValueError(
                f"ratio={self.ratio} is more than cells of {cell} can merge, which keep a token each: {most:g}"
            )
        check_count("dense_layers", self.dense_layers)
        check_count("seed", self.seed)

    def attach(self, context: Context) -> None:
        """Plan the bridge of every self-attention and joint attention."""
        generation = context.track_generation(self.name)
        for number, site in enumerate(attention_sites(context, self.name, ("self", "joint"))):
            if site.layer < self.dense_layers:
                context.skip(self.name, site.module, f"layer {site.layer} of dense_layers={self.dense_layers}")
                continue
            policy = Merging(self, number, generation)
            bridge(context, self.name, site, policy, grid=self.grid)
            context.transaction.set(site.module, POLICY, policy, self.name)

    def activity(self, model: nn.Module) -> dict[str, Any]:
        """Calls on merged tokens, and those left dense with the reason."""
        policies = [m.__dict__[POLICY] for m in model.modules() if POLICY in m.__dict__]
        dense: Counter[str] = Counter()
        for policy in policies:
            dense.update(policy.left)
        merged = sum(policy.calls for policy in policies)
        found: dict[str, Any] = {"merged calls": merged, "dense calls": sum(dense.values())}
        found |= {f"dense: {reason}": n for reason, n in dense.items()}
        if dense and not merged:
            found["warning"] = "never merged anything"
        return found


class Merging:
    """Attention of one site over merged tokens.

    Attributes:
        calls: Calls over merged tokens.
        left: Calls that stayed dense, by reason.
    """

    def __init__(self, method: ToMe, number: int, generation: Generation) -> None:
        self.method, self.number, self.generation = method, number, generation
        self.calls, self.left = 0, Counter[str]()

    def __call__(self, call: AttentionCall) -> Tensor | None:
        """Attend, or leave the call dense."""
        reason = self.refusal(call)
        if reason is not None:
            self.left[reason] += 1
            return None
        self.calls += 1
        assert call.grid is not None and call.text is not None
        start, length = call.text
        latents = slice(length, None) if length and start == 0 else slice(0, call.q.shape[1] - length)
        step = self.generation.index if self.generation.active else 0
        with torch.no_grad():
            index = match_tokens(
                call.k[:, latents].flatten(2), self.method.ratio, grid=call.grid, cell=self.cell(call.grid),
                seed=self.method.seed, step=step, route=self.number,
            )  # fmt: skip

        def merged(t: Tensor) -> Tensor:
            few = merge_tokens(t[:, latents].flatten(2), index).unflatten(2, t.shape[2:])
            if not length:
                return few
            return torch.cat([t[:, :length], few] if start == 0 else [few, t[:, start:]], 1)

        out = call.dense(q=merged(call.q), k=merged(call.k), v=merged(call.v))
        rows = out[:, length:] if length and start == 0 else out[:, : index.merged]
        full = unmerge_tokens(rows.flatten(2), index).unflatten(2, out.shape[2:])
        if not length:
            return full
        return torch.cat([out[:, :length], full] if start == 0 else [full, out[:, index.merged :]], 1)

    def cell(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The cell along every axis of a grid."""
        return (*[1] * (len(grid) - 2), *self.method.cell)

    def refusal(self, call: AttentionCall) -> str | None:
        """Why a call stays dense, or None."""
        if call.mask is not None:
            return "the model masks its keys"
        if call.is_causal:
            return "is_causal=True"
        if call.q.shape[1] != call.k.shape[1]:
            return "queries and keys are not the same tokens"
        grid = call.grid
        if grid is None or call.text is None:
            return "the grid or the text is not known"
        if call.order is not None:
            return "the model runs in another order of tokens"
        if len(grid) < 2 or any(n % c for n, c in zip(grid, self.cell(grid), strict=True)):
            return f"grid {grid} is no whole number of cells"
        return None


# It counts, and draws by the step: in a graph each step would be a constant, and compiled anew.
Merging.__call__._torchdynamo_disable = True  # type: ignore[attr-defined]
