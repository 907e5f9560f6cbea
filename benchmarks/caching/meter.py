"""What a run computed and held, counted from outside, by one rule for every library.

No library's own statistics are used: floating-point operations are those of the matrix products and attention calls
that torch really dispatched, bytes are the tensors that can be reached from the model between two of its calls.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention
# CPU attention has an operator of its own, with the same leading arguments.
_SAME_FORMULA = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _FLASH}
_OF_EVERY_MODULE = set(vars(nn.Module()))
_OPAQUE = (type, types.ModuleType, types.FunctionType, types.MethodType, DiffusionPipeline, SchedulerMixin)
_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)


class Meter(TorchDispatchMode):
    """Counts, for every call of `model`, floating-point operations, and the bytes it holds after the call.

    Args:
        model: The transformer, patched already. Leaving the context takes the meter off it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.flops, self.peak_bytes = model, [0], 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        formula = flop_registry.get(_SAME_FORMULA.get(packet, packet))
        if formula is not None:
            self.flops[-1] += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def _after_call(self, *_: Any) -> None:
        self.flops.append(0)
        self.peak_bytes = max(self.peak_bytes, held_bytes(self.model))

    def __enter__(self) -> Meter:
        self._hook = self.model.register_forward_hook(self._after_call)
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._hook.remove()

    def totals(self) -> dict[str, Any]:
        """Calls of the model, those that computed less than the fullest call, and the sums."""
        calls = self.flops[:-1]
        full = max(calls, default=0)
        return {
            "flops": sum(calls),
            "calls": len(calls),
            "reduced_calls": sum(flops < 0.99 * full for flops in calls),
            "bytes_held": self.peak_bytes,
        }


def held_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that hang on the modules of `model`, parameters and buffers not counted."""
    own = {_storage(t).data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: set[int] = set()
    found: dict[int, int] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in _OF_EVERY_MODULE:
                for tensor in _tensors(value, seen):
                    storage = _storage(tensor)
                    if storage.data_ptr() not in own:
                        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor reachable from `value` through containers and attributes; modules are their owner's business."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, (*_PLAIN, *_OPAQUE, nn.Module)) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple | set | frozenset | deque):
            pending += value
        else:
            pending += getattr(value, "__dict__", {}).values()
            pending += [getattr(value, name, None) for name in getattr(type(value), "__slots__", ())]
