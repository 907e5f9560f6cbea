"""A remembered module: its output is computed on some steps and taken from memory on the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import Schedule
from ..patching.transaction import Transaction, original
from .generation import Generation
from .history import History

SITE = "_maskaccel_site"


@dataclass
class _Held:
    """What one guidance branch remembers of a module."""

    key: tuple  # shape, dtype and device of the input
    is_tuple: bool
    histories: list[History]
    used: int  # last step at which it was written or read


class Site:
    """The memory of one module: a history for each guidance branch and each tensor it returns.

    A module that runs twice within one step of one branch has no single output to remember; from then on that branch
    computes until the run ends. That is the case of a guided model whose calls nobody names: nothing says which call
    is which.

    Attributes:
        computed: Calls that ran the module.
        reused: Calls answered from memory.
        resets: Times the memory was dropped because the input changed its shape, dtype or device.
        refused: Times a branch was given up because it ran twice in a step.
    """

    def __init__(self, generation: Generation, schedule: Schedule) -> None:
        self.generation, self.schedule = generation, schedule
        self.computed = self.reused = self.resets = self.refused = 0
        self._memory: dict[str, _Held] = {}
        self._given_up: set[str] = set()
        generation.memories.append(self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model starts without the features of the original.
        return {**self.__dict__, "_memory": {}, "_given_up": set()}

    def clear(self) -> None:
        """Forget every branch."""
        self._memory.clear()
        self._given_up.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(h.nbytes for held in self._memory.values() for h in held.histories)

    def recall(self, x: Tensor) -> Any | None:
        """The remembered output if this step reuses it, else None. A view of the memory: not to be written to."""
        generation = self.generation
        if not generation.active or torch.is_grad_enabled():
            return None
        branch = generation.branch_key
        held = self._memory.get(branch)
        if held is None or self.schedule.computes(generation.index, generation.num_steps):
            return None
        if held.key != _key(x):
            self.resets += 1
            self._memory.clear()
            return None
        if held.used == generation.index:
            self._give_up(branch)
            return None
        held.used = generation.index
        self.reused += 1
        return tuple(h.newest() for h in held.histories) if held.is_tuple else held.histories[0].newest()

    def store(self, x: Tensor, output: Any) -> None:
        """Remember the output of a computed call."""
        self.computed += 1
        generation = self.generation
        branch = generation.branch_key
        if not generation.active or torch.is_grad_enabled() or branch in self._given_up:
            return
        tensors = output if isinstance(output, tuple) else (output,)
        if not all(isinstance(t, Tensor) for t in tensors):
            return
        key = _key(x)
        held = self._memory.get(branch)
        if held is not None and held.used == generation.index:
            self._give_up(branch)
            return
        if held is None or held.key != key or len(held.histories) != len(tensors):
            histories = [History() for _ in tensors]
            held = self._memory[branch] = _Held(key, isinstance(output, tuple), histories, generation.index)
        held.used = generation.index
        for history, tensor in zip(held.histories, tensors, strict=True):
            history.push(tensor, generation.index)

    def _give_up(self, branch: str) -> None:
        self.refused += 1
        self._given_up.add(branch)
        del self._memory[branch]


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
    x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    found = None if x is None else site.recall(x)
    if found is not None:
        # The caller is not ours and may write to what it gets.
        return tuple(t.clone() for t in found) if isinstance(found, tuple) else found.clone()
    output = original(self)(*args, **kwargs)
    if x is not None:
        site.store(x, output)
    return output
