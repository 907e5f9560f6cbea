"""The networks that the script trains, behind one call: `velocity(network, images, times, labels)`."""

from __future__ import annotations

import sources  # noqa: F401  it makes the example model's folder importable
from sit import SiT
from torch import Tensor, nn

KINDS = ("sit", "dit")


def build(
    kind: str, *, size: int, channels: int, patch: int, width: int, depth: int, heads: int, classes: int, rope: bool
) -> nn.Module:
    """An untrained network: `"sit"`, the module beside this file, or `"dit"`, diffusers' `DiTTransformer2DModel`.

    The other arguments are those of `sit.SiT`.

    Raises:
        ValueError: Another kind, sizes that do not fit, or `rope` with `"dit"`, which has none.
    """
    if kind == "sit":
        return SiT(size, channels, patch, width, depth, heads, classes, rope)
    if kind != "dit":
        raise ValueError(f"network={kind!r}; allowed are {', '.join(KINDS)}")
    if rope:
        raise ValueError("rope=True: the DiT of diffusers has no rotary positions; use the network 'sit'")
    if size % patch or width % heads:
        raise ValueError(f"patch={patch} must divide size={size}, and heads={heads} must divide width={width}")
    from diffusers import DiTTransformer2DModel
    from train import prepare

    return prepare(
        DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=channels,
            out_channels=channels,
            num_layers=depth,
            patch_size=patch,
            sample_size=size,
            num_embeds_ada_norm=classes,
        )
    )


def velocity(network: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """What the network predicts for images `(B, C, H, W)` at times `(B,)` in 0..1 with labels `(B,)`."""
    if isinstance(network, SiT):
        return network(x, t, y)
    return network(x, timestep=1000 * t, class_labels=y).sample
