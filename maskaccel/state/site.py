"""A remembered module: its output is computed on some steps and taken from memory on the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..masks import Schedule
from ..patching.transaction import Transaction, original
from .generation import Generation
from .history import History

SITE = "_maskaccel_site"


class Site:
    """The memory of one module: a history for each guidance branch and each tensor it returns.

    Attributes:
        computed: Calls that ran the module.
        reused: Calls answered from memory.
        resets: Times the memory was dropped because the input changed its shape, dtype or device.
    """

    def __init__(self, generation: Generation, schedule: Schedule) -> None:
        self.generation, self.schedule = generation, schedule
        self.computed = self.reused = self.resets = 0
        self._memory: dict[str, tuple[tuple, bool, list[History]]] = {}  # branch -> (input key, was a tuple, histories)
        generation.memories.append(self)

    def clear(self) -> None:
        """Forget every branch."""
        self._memory.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(h.nbytes for _, _, histories in self._memory.values() for h in histories)

    def recall(self, x: Tensor) -> Any | None:
        """The remembered output if this step reuses it, else None. A view of the memory: not to be written to."""
        generation = self.generation
        if not generation.active or torch.is_grad_enabled():
            return None
        held = self._memory.get(generation.branch_key)
        if held is None or self.schedule.computes(generation.index, generation.num_steps):
            return None
        key, is_tuple, histories = held
        if key != _key(x):
            self.resets += 1
            self.clear()
            return None
        self.reused += 1
        return tuple(h.newest() for h in histories) if is_tuple else histories[0].newest()

    def store(self, x: Tensor, output: Any) -> None:
        """Remember the output of a computed call."""
        self.computed += 1
        generation = self.generation
        if not generation.active or torch.is_grad_enabled():
            return
        tensors = output if isinstance(output, tuple) else (output,)
        if not all(isinstance(t, Tensor) for t in tensors):
            return
        branch, key = generation.branch_key, _key(x)
        held = self._memory.get(branch)
        if held is None or held[0] != key or len(held[2]) != len(tensors):
            held = self._memory[branch] = (key, isinstance(output, tuple), [History() for _ in tensors])
        for history, tensor in zip(held[2], tensors, strict=True):
            history.push(tensor, generation.index)


def _key(x: Tensor) -> tuple:
    return x.shape, x.dtype, x.device


def remember(module: nn.Module, site: Site, transaction: Transaction, claimant: str) -> None:
    """Plan that `module` answers from `site` on the steps that reuse it."""
    transaction.set(module, SITE, site, claimant)
    transaction.wrap_forward(module, _remembered_forward, claimant)


def recall(module: nn.Module, x: Tensor) -> Any | None:
    """The remembered output of a module, or None if it has none or this step computes it.

    Fused blocks ask before they prepare the module's input, so that a reused module costs nothing at all.
    """
    site = module.__dict__.get(SITE)
    return None if site is None else site.recall(x)


def _remembered_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    site: Site = self.__dict__[SITE]
    x = args[0] if args else kwargs["hidden_states"]
    found = site.recall(x)
    if found is not None:
        # The caller is not ours and may write to what it gets.
        return tuple(t.clone() for t in found) if isinstance(found, tuple) else found.clone()
    output = original(self)(*args, **kwargs)
    site.store(x, output)
    return output
