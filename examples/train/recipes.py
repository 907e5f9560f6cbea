"""The methods of `--method`: what each patches into the network, and the loss that it is trained with."""

from __future__ import annotations

from collections.abc import Callable

import networks
import torch.nn.functional as F
from objective import Objective, flow_loss
from options import Options
from sources import Images
from torch import Tensor, nn

import maskaccel
from maskaccel import methods


class Routed(Objective):
    """A network whose tokens a method routes; the loss is that of flow matching over all of them (TREAD, SPRINT).

    Args:
        network: A SiT, or any other model that `maskaccel.patch` knows the blocks of.
        route: The method. What it trains, and its step, are part of this module.
        images: What is trained on.
        options: The run's.
    """

    def __init__(self, network: nn.Module, route: maskaccel.TokenRoute, images: Images, options: Options) -> None:
        super().__init__(network, images)
        maskaccel.patch(network, [route])
        self.route, self.keep, self.dense_from = route, route.keep, options.dense_from

    def loss(self, x: Tensor, t: Tensor, y: Tensor, target: Tensor, step: int, first: int) -> Tensor:
        """As of `Objective`."""
        self.route.step, self.route.sample_offset = step, first
        dense = step >= self.dense_from
        self.route.keep, self.route.is_range = (1.0, False) if dense else (self.keep, isinstance(self.keep, tuple))
        loss = self.routed_loss(x, t, y, target)
        # Not every step uses all that the method trains, and DDP waits for a gradient of every parameter.
        return loss + 0.0 * sum(p.float().sum() for p in self.route.parameters() if p.requires_grad)

    def routed_loss(self, x: Tensor, t: Tensor, y: Tensor, target: Tensor) -> Tensor:
        """The loss of each sample, tokens dropped."""
        return flow_loss(self.velocity(x, t, y), target)


class MDT(Routed):
    """The loss of a dense pass plus that of a masked one, with the same times and noise."""

    def routed_loss(self, x: Tensor, t: Tensor, y: Tensor, target: Tensor) -> Tensor:
        """As of `Routed`."""
        with self.route.dense():
            dense = flow_loss(self.velocity(x, t, y), target)
        return dense if self.route.keep == 1.0 else dense + flow_loss(self.velocity(x, t, y), target)


class Kept(Routed):
    """The loss over the patches of kept tokens alone (MicroDiT).

    With a `weight` (MaskDiT) that of a masked autoencoder over the other patches is added: the squared difference of
    the denoised image x_t - t v and the noised one, each patch of which is normalised.
    """

    weight = 0.0

    def routed_loss(self, x: Tensor, t: Tensor, y: Tensor, target: Tensor) -> Tensor:
        """As of `Routed`."""
        v = self.velocity(x, t, y).float()
        index = self.route.index
        if index is None:
            return flow_loss(v, target)
        patch, kept = self.network_patch(), index.mask.float()
        error = F.avg_pool2d((v - target).square().mean(1, keepdim=True), patch).flatten(1)
        loss = (error * kept).sum(1) / kept.sum(1)
        if not self.weight:
            return loss
        wanted, found = (F.unfold(image, patch, stride=patch) for image in (x, x - t[:, None, None, None] * v))
        wanted = (wanted - wanted.mean(1, keepdim=True)) / (wanted.var(1, keepdim=True) + 1e-6).sqrt()
        error, dropped = (found - wanted).square().mean(1), 1 - kept
        return loss + self.weight * (error * dropped).sum(1) / dropped.sum(1)

    def network_patch(self) -> int:
        """Pixels of a side of a patch."""
        return getattr(self.network, "patch_size", None) or self.network.config.patch_size


class MaskDiT(Kept):
    """Kept patches as in flow matching, and a tenth of the masked autoencoder's loss for the others."""

    weight = 0.1


def _quarter(options: Options) -> int:
    """Blocks of a decoder or a mixer: the papers give them about a quarter."""
    return max(1, options.depth // 4)


ROUTES: dict[str, tuple[type[Routed], Callable[[Options], maskaccel.TokenRoute]]] = {
    "tread": (Routed, lambda options: methods.TREAD(seed=options.seed)),
    "sprint": (Routed, lambda options: methods.SPRINT(seed=options.seed)),
    "mdt": (MDT, lambda options: methods.MDT(_quarter(options), seed=options.seed)),
    "maskdit": (MaskDiT, lambda options: methods.MaskDiT(_quarter(options), seed=options.seed)),
    "microdit": (Kept, lambda options: methods.MicroDiT(_quarter(options), seed=options.seed)),
}


def build(options: Options, images: Images) -> Objective:
    """The network of a run, patched by its method.

    Raises:
        ValueError: Sizes do not fit each other, or the method.
        maskaccel.PatchError: The method cannot work on the network.
    """
    network = networks.build(
        options.network,
        size=images.size,
        channels=images.channels,
        patch=options.patch,
        width=options.width,
        depth=options.depth,
        heads=options.heads,
        classes=len(images.classes),
        rope=options.rope,
    )
    if options.method == "none":
        return Objective(network, images)
    objective, route = ROUTES[options.method]
    return objective(network, route(options), images, options)
