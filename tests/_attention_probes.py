"""Methods that look at the attention of a model, and how models are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maskaccel.patching.attention import AttentionCall, attention_activity, attention_sites, bridge


class Scaled:
    """A policy with a state: the model's own attention, times a factor; it notes its calls."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor, self.calls = factor, 0

    def __call__(self, call: AttentionCall) -> Tensor:
        if not torch.compiler.is_compiling():
            self.calls += 1
        return self.factor * call.dense()


class Probe:
    """A method that gives sites of some kinds one policy."""

    kind, models, name = "lossy", "any", "Probe"

    def __init__(self, policy: Any = None, kinds: Any = ("self", "joint", "cross"), grid: Any = None) -> None:
        self.policy, self.kinds, self.grid = policy or Scaled(), kinds, grid

    def attach(self, context: Any) -> None:
        for site in attention_sites(context, self.name, self.kinds):
            bridge(context, self.name, site, self.policy, grid=self.grid)

    def activity(self, model: nn.Module) -> dict[str, Any]:
        return attention_activity(model, self.name)


class Second(Probe):
    name = "Second"


def state_of(model: nn.Module) -> list[dict[str, Any]]:
    return [dict(vars(module)) for module in model.modules()]


def same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> bool:
    return all(a.keys() == b.keys() and all(a[k] is b[k] for k in a) for a, b in zip(first, second, strict=True))


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))
