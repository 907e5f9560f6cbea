"""Z-Image: one stream of image and text tokens, RMS sandwiches with tanh gates.

With reference images, noisy and clean tokens take their modulation from different timesteps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _sandwich
from ._adapter import Adapter, table
from ._attention import FusedProcessor, complex_table, derived, norm_and_rotate


def _rows(noise_mask: Tensor, batch: int) -> Tensor:
    """Row of the `(2 * batch, D)` modulation that each token reads: the first half where the mask is 1 (noisy)."""

    def make(mask: Tensor) -> Tensor:
        sample = torch.arange(batch, device=mask.device, dtype=torch.int32)
        return (mask != 1).to(torch.int32) * batch + sample[:, None]

    return derived(noise_mask, f"_maskaccel_rows_{batch}", make)


def _modulation(
    self: Any,
    adaln_input: Tensor | None,
    noise_mask: Tensor | None,
    adaln_noisy: Tensor | None,
    adaln_clean: Tensor | None,
) -> _sandwich.Modulation:
    if not self.modulation:
        return _sandwich.Modulation()
    if noise_mask is None:
        return _sandwich.Modulation(*self.adaLN_modulation(adaln_input).chunk(4, dim=1))
    both = torch.cat([self.adaLN_modulation(adaln_noisy), self.adaLN_modulation(adaln_clean)])
    scale, gate, mlp_scale, mlp_gate = both.chunk(4, dim=1)
    return _sandwich.Modulation(scale, gate, mlp_scale, mlp_gate, _rows(noise_mask, both.shape[0] // 2))


def forward(
    self: Any,
    x: Tensor,
    attn_mask: Tensor | None,
    freqs_cis: Tensor | None,
    adaln_input: Tensor | None = None,
    noise_mask: Tensor | None = None,
    adaln_noisy: Tensor | None = None,
    adaln_clean: Tensor | None = None,
) -> Tensor:
    """ZImageTransformerBlock with fused adaLN sites."""
    norms = (self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2)
    modulation = _modulation(self, adaln_input, noise_mask, adaln_noisy, adaln_clean)
    if not _sandwich.can_fuse(x, norms, modulation):
        return type(self).forward(self, x, attn_mask, freqs_cis, adaln_input, noise_mask, adaln_noisy, adaln_clean)

    def attend(y: Tensor) -> Tensor:
        return self.attention(y, attention_mask=attn_mask, freqs_cis=freqs_cis)

    return _sandwich.run(x, self.attention, attend, self.feed_forward, norms, modulation)


class ZImageFusedProcessor(FusedProcessor):
    """ZSingleStreamAttnProcessor with QK norm and RoPE in one pass."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        """Attention of the original processor."""
        heads = (attn.heads, -1)
        q, k, v = (to(hidden_states).unflatten(-1, heads) for to in (attn.to_q, attn.to_k, attn.to_v))
        cos_sin: tuple = (None, None) if freqs_cis is None else complex_table(freqs_cis)
        q, k = norm_and_rotate(attn, q, k, *cos_sin)
        k = k.to(q.dtype)

        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None, :]
        out = self._dispatch(
            q, k, v, attn_mask=attention_mask, dropout_p=0.0, is_causal=False, backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )  # fmt: skip
        out = attn.to_out[0](out.flatten(2, 3).to(q.dtype))
        return attn.to_out[1](out) if len(attn.to_out) > 1 else out


_MODULE = "diffusers.models.transformers.transformer_z_image:"

BLOCKS = table(
    Adapter(
        cls=_MODULE + "ZImageTransformerBlock",
        forward=forward,
        fingerprints=frozenset({"8898daa3d050"}),
        sites=("attention", "feed_forward"),
    )
)
PROCESSORS = table(
    Adapter(
        cls=_MODULE + "ZSingleStreamAttnProcessor",
        forward=ZImageFusedProcessor,
        fingerprints=frozenset({"52cf823d27a9"}),
        method="__call__",
    )
)

__all__ = ["BLOCKS", "PROCESSORS", "ZImageFusedProcessor", "forward"]
