"""The moving average of the weights: what samples are drawn with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from parallel import like
from torch import Tensor, nn


class Ema:
    """An exponential moving average of a model's parameters, sharded where they are.

    Args:
        model: The model, wrapped for its ranks already.
        decay: Weight of the past. Early steps use less, (1 + step) / (10 + step), so that the start is forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = dict(model.named_parameters())
        self._mean = {name: p.detach().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step `step`, counted from 0."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._mean.values()), [p.detach() for p in self._live.values()], weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return dict(self._mean)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load whole tensors."""
        for name, mean in self._mean.items():
            mean.copy_(like(mean, state[name]))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model's parameters are the averages."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, p in self._live.items():
            kept = p.detach().clone()
            p.copy_(self._mean[name])
            self._mean[name].copy_(kept)
