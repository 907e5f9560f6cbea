"""What one training step minimises: flow matching on the linear path, as a method of token dropping changes it."""

from __future__ import annotations

from networks import velocity
from sources import Batch
from torch import Tensor, nn


class Objective(nn.Module):
    """A network, the parameters that a method adds to it, and the loss; all that is trained, in one module.

    The path is linear: x_t = (1 - t) x + t e, and the network predicts e - x (Liu et al. 2022, arXiv 2209.03003, with
    time reversed).

    Args:
        network: The network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, labels: Tensor, times: Tensor, noise: Tensor, step: int, first: int) -> Tensor:
        """The loss of each sample, `(B,)`; arguments are the fields of `sources.Batch`."""
        t = times[:, None, None, None]
        predicted = velocity(self.network, (1 - t) * images + t * noise, times, labels)
        return (predicted.float() - (noise - images)).square().flatten(1).mean(1)


def loss(objective: nn.Module, batch: Batch) -> Tensor:
    """The loss of each sample of a batch, from an objective or from what wraps it for several ranks."""
    return objective(batch.images, batch.labels, batch.times, batch.noise, batch.step, batch.first)
