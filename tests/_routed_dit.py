"""A DiT to route, in training mode, and what the tests compare of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zoo.common import made

DEPTH = 6


def built() -> tuple[nn.Module, dict[str, Tensor]]:
    """Six blocks on 4 x 4 tokens, and the arguments of a call with three samples."""
    from diffusers import DiTTransformer2DModel

    model = made(DiTTransformer2DModel, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
                 num_layers=DEPTH, sample_size=8, patch_size=2, num_embeds_ada_norm=1000, dropout=0.0)  # fmt: skip
    for module in model.modules():
        if hasattr(module, "dropout_prob"):  # of labels, at random in training mode: no two calls would be alike
            module.dropout_prob = 0
    generator = torch.Generator().manual_seed(0)
    return model.train(), {
        "hidden_states": torch.randn(3, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([10, 500, 900]),
        "class_labels": torch.tensor([1, 2, 3]),
    }


def gradients(model: nn.Module, inputs: dict, loss_of=None) -> list[Tensor]:
    """Outputs and the gradients of all parameters and of the latents."""
    given = dict(inputs)
    given["hidden_states"] = latents = inputs["hidden_states"].clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    out = model(**given).sample
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ((out * weight).sum() if loss_of is None else loss_of(out)).backward()
    return [out.detach(), latents.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def close(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
