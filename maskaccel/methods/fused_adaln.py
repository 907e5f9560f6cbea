"""FusedAdaLN: the norm, modulate, gate, residual, QK-norm and RoPE sites of a model on fused kernels. Exact.

Blocks of known families get a whole fused forward (and fused attention processors); adaLN norm modules anywhere else
are replaced one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models import Adapter, block_adapter, norm_adapter, processor_adapter
from ..patching.patch import Context

CALLS = "_maskaccel_fused_calls"


@dataclass(frozen=True)
class FusedAdaLN:
    """Fuse adaLN and QK-norm + RoPE sites.

    Attributes:
        attention: Also replace attention processors by ones with fused QK norm and RoPE.
        blocks: Fuse whole blocks of known families; without it only norm modules are replaced.
    """

    attention: bool = True
    blocks: bool = True

    name = "FusedAdaLN"
    paper = "DiT (Peebles and Xie 2023), section 3.2"
    kind = "exact"
    models = "blocks of the families in docs/models.md; the adaLN norms of every other"

    def attach(self, context: Context) -> None:
        """Plan the fused forwards of one model."""
        inside: set[int] = set()
        for module in context.model.modules():
            adapter = block_adapter(module) if self.blocks else None
            if adapter is not None and self._replace(context, module, adapter, "fused block"):
                inside.update(id(child) for child in module.modules() if norm_adapter(child) is not None)
        for module in context.model.modules():
            adapter = norm_adapter(module)
            if adapter is not None and id(module) not in inside:
                self._replace(context, module, adapter, "fused norm")
            if self.attention:
                self._swap_processor(context, module)

    def _replace(self, context: Context, module: nn.Module, adapter: Adapter, action: str) -> bool:
        refusal = adapter.refusal(module)
        if refusal is not None:
            context.skip(self.name, module, refusal)
            return False
        context.transaction.replace_forward(module, _counted(adapter.forward), self.name)
        context.transaction.set(module, CALLS, [0], self.name)
        context.done(self.name, module, action)
        return True

    def _swap_processor(self, context: Context, module: nn.Module) -> None:
        processor = getattr(module, "processor", None)
        adapter = None if processor is None else processor_adapter(processor)
        if processor is None or adapter is None:
            return
        refusal = adapter.refusal(processor) or adapter.idle(module)
        if refusal is not None:
            context.skip(self.name, processor, refusal)
            return
        context.transaction.set(module, "processor", adapter.forward(processor), self.name)
        context.done(self.name, processor, "fused QK norm and RoPE")

    def activity(self, model: nn.Module) -> dict[str, Any]:
        """Calls of fused forwards since the patch (calls inside a compiled graph are not counted)."""
        return {"fused calls": sum(m.__dict__[CALLS][0] for m in model.modules() if CALLS in m.__dict__)}


@functools.cache
def _counted(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            self.__dict__[CALLS][0] += 1
        return forward(self, *args, **kwargs)

    return counted
