"""Latents of a reference image, which some tokens are to become."""

from __future__ import annotations

import torch
from torch import Tensor

from ..patching.selector import Seen
from ._active import Given, value_of


def reference_like(given: Given, sample: Tensor) -> Tensor:
    """The reference latents that the user gave, for this batch of latents.

    Raises:
        ValueError: They are of another shape; a batch of 1 serves any.
    """
    reference = value_of("reference", given)
    if reference.shape[1:] != sample.shape[1:] or reference.shape[0] not in (1, sample.shape[0]):
        raise ValueError(
            f"reference has shape {tuple(reference.shape)}; it must be that of the latents, {tuple(sample.shape)}, or "
            "have a batch of 1. They are those that the solver is given, in some pipelines (DiTPipeline) of both "
            "guidance branches: reference.repeat(2, 1, 1, 1)"
        )
    return reference.to(sample.device, torch.promote_types(sample.dtype, torch.float32))


def towards(seen: Seen, reference: Tensor, share: Tensor) -> Tensor:
    """An output whose clean latents are the reference where `share` is 1, those of `seen.output` where it is 0.

    Args:
        seen: The step.
        reference: Of `reference_like`.
        share: `(B|1, N)`, fp32.
    """
    weight = seen.where.spread(share, seen.output)
    wide = reference.dtype
    output, sample = seen.output.to(wide), seen.sample.to(wide)
    clean = torch.lerp(seen.point.clean(output, sample), reference, weight.to(wide))
    return torch.where(weight > 0, seen.point.output(clean, sample), output).to(seen.output.dtype)
