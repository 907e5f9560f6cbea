"""What one training step minimises: flow matching on the linear path, nothing dropped. `recipes.py` has the methods."""

from __future__ import annotations

from collections.abc import Iterable

from networks import velocity
from sources import Batch, Images
from torch import Tensor, nn


class Objective(nn.Module):
    """A network, the parameters that a method adds to it, and the loss; all that is trained, in one module.

    The path is linear: x_t = (1 - t) x + t e, and the network predicts e - x (Liu et al. 2022, arXiv 2209.03003, with
    time reversed).

    Args:
        network: The network.
        images: What it is trained on.
    """

    def __init__(self, network: nn.Module, images: Images) -> None:
        super().__init__()
        self.network, self.images = network, images

    def blocks(self) -> Iterable[nn.Module]:
        """The transformer blocks: what is compiled, and what FSDP2 gathers one at a time."""
        return self.network.blocks if hasattr(self.network, "blocks") else self.network.transformer_blocks

    def velocity(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """What is predicted for images `(B, C, H, W)` at times `(B,)` with labels `(B,)`, all tokens seen."""
        return velocity(self.network, x, t, y)

    def forward(self, images: Tensor, labels: Tensor, times: Tensor, noise: Tensor, step: int, first: int) -> Tensor:
        """The loss of each sample, `(B,)`; arguments are the fields of `sources.Batch`.

        In eval mode nothing is dropped, and the loss is that of flow matching whatever the method.
        """
        x, target = noised(images, times, noise), noise - images
        if self.training:
            return self.loss(x, times, labels, target, step, first)
        return flow_loss(self.velocity(x, times, labels), target)

    def loss(self, x: Tensor, t: Tensor, y: Tensor, target: Tensor, step: int, first: int) -> Tensor:
        """What a training step minimises for each sample, `(B,)`."""
        return flow_loss(self.velocity(x, t, y), target)


def noised(images: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    t = times[:, None, None, None]
    return (1 - t) * images + t * noise


def flow_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each sample, `(B,)`."""
    return (predicted.float() - target).square().flatten(1).mean(1)


def loss(objective: nn.Module, batch: Batch) -> Tensor:
    """The loss of each sample of a batch, from an objective or from what wraps it for several ranks."""
    return objective(batch.images, batch.labels, batch.times, batch.noise, batch.step, batch.first)
