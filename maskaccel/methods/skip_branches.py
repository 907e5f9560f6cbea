"""Long skip branches of a transformer (Chen et al. 2024, Skip-DiT, arXiv 2411.17616, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..models import Streams
from ..ops._checks import count as check_count
from ..patching.patch import Context
from ..patching.transaction import PatchError
from . import _cached

BRANCH = "_maskaccel_skip_branch"


class SkipBranches(nn.Module):
    """Feed the output of block `L-1-i` to block `i` of the second half of a model with L blocks.

    The paper's branch is `Linear(LN(concat[x, skip]))` for every `i >= L/2` (for odd L the block in the middle has
    none), which no initialisation makes the identity. Here it is added to x, and the linear layers begin at zero: until
    they are trained the model computes exactly what it computed without branches. Its parameters are its own: train
    it, with the model or alone, and keep its `state_dict()` beside the model's.

    It is a method like any other, so it is attached and removed by `maskaccel.patch(model, [SkipCache(), branches])`.
    Name `SkipCache` first: then blocks that are skipped do not compute their branches either.

    Args:
        width: Channels of the hidden states.
        depth: Blocks of the model (L), 2 or more.
        residual: Add the branch to x. Without it x is replaced, as in the paper: for weights that were trained so.
    """

    name = "SkipBranches"
    paper = "Skip-DiT: Accelerating Vision Diffusion Transformers with Skip Branches (arXiv 2411.17616)"
    kind = "lossy"
    models = "stacks with one stream: DiT, PixArt, Wan, ..."

    def __init__(self, width: int, depth: int, *, residual: bool = True) -> None:
        super().__init__()
        for field, value, low in (("width", width, 1), ("depth", depth, 2)):
            check_count(field, value, low)
        self.width, self.depth, self.residual = width, depth, residual
        self.norms = nn.ModuleList(nn.LayerNorm(2 * width, eps=1e-6) for _ in range(depth // 2))
        self.linears = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth // 2))
        if residual:
            for parameter in self.linears.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, skip: Tensor, branch: int) -> Tensor:
        """The hidden states that enter block `L - depth//2 + branch`: `(B, N, width)` from two of that shape."""
        y = self.linears[branch](self.norms[branch](torch.cat([x, skip], dim=-1)))
        return x + y if self.residual else y

    def attach(self, context: Context) -> None:
        """Plan a wrapper for every block.

        Raises:
            PatchError: The blocks have more than one stream, or are not `depth` in number.
        """
        pairs = [pair for segment in _cached.segments_of(self, context.model) for pair in segment]
        model = type(context.model).__name__
        if any(len(streams.inputs) != 1 for _, streams in pairs):
            raise PatchError(f"{self.name}: the blocks of {model} have more than one stream; it serves models with one")
        if len(pairs) != self.depth:
            raise PatchError(f"{self.name}: depth={self.depth}, but {model} has {len(pairs)} blocks")
        call = _Call(self)
        for i, (block, streams) in enumerate(pairs):
            context.transaction.set(block, BRANCH, (call, i, streams), self.name)
            context.transaction.wrap_forward(block, _branched_forward)
            context.done(self.name, block, "skip branch")

    def activity(self, model: nn.Module) -> dict[str, Any]:
        """How many branches there are."""
        return {"branches": len(self.linears)}


class _Call:
    """The skips of one call of the model."""

    def __init__(self, branches: SkipBranches) -> None:
        self.branches = branches
        self.skips: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "skips": {}}

    def run(self, i: int, streams: Streams, inner: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Block number i with its branch."""
        depth, half = self.branches.depth, self.branches.depth // 2
        if i >= depth - half:
            # Recomputation (gradient checkpointing) asks for a skip again, so it is only dropped without gradients.
            from_ = depth - 1 - i
            skip = self.skips[from_] if torch.is_grad_enabled() else self.skips.pop(from_)
            x = streams.take(args, kwargs)[0]
            args, kwargs = _replaced(streams, args, kwargs, self.branches(x, skip, i - (depth - half)))
        output = inner(*args, **kwargs)
        if i < half:
            after = streams.read(output)[0]
            assert after is not None
            self.skips[i] = after
        return output


def _replaced(streams: Streams, args: tuple, kwargs: dict[str, Any], x: Tensor) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a block with another tensor as its stream."""
    at = streams.positions[0]
    if at < len(args):
        return (*args[:at], x, *args[at + 1 :]), kwargs
    return args, {**kwargs, streams.inputs[0]: x}


def _branched_forward(self: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    call, i, streams = self.__dict__[BRANCH]
    return call.run(i, streams, inner, args, kwargs)
