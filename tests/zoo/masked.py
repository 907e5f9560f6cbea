"""Tiny masked models in their real pipelines, built offline."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from .common import made, randn

CODES, MASK, SIZE = 32, 35, 8


def amused(kind: str = "AmusedPipeline") -> Any:
    """An aMUSEd pipeline: `AmusedPipeline`, `AmusedImg2ImgPipeline` or `AmusedInpaintPipeline`."""
    transformer = made(
        diffusers.UVit2DModel, hidden_size=32, cond_embed_dim=32, micro_cond_encode_dim=4, micro_cond_embed_dim=20,
        encoder_hidden_size=32, vocab_size=MASK + 1, codebook_size=CODES, in_channels=32, block_out_channels=32,
        num_res_blocks=1, block_num_heads=2, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        sample_size=SIZE,
    )  # fmt: skip
    vqvae = made(
        diffusers.VQModel, act_fn="silu", block_out_channels=[8, 16], down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=8, layers_per_block=1, norm_num_groups=4,
        num_vq_embeddings=CODES, sample_size=16, mid_block_add_attention=False, lookup_from_codebook=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers calls the pipeline deprecated
        pipeline = getattr(diffusers, kind)(
            vqvae=vqvae, tokenizer=None, text_encoder=None, transformer=transformer,
            scheduler=diffusers.AmusedScheduler(mask_token_id=MASK),
        )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def amused_inputs(batch: int = 2) -> dict[str, Any]:
    """Prompt embeddings of a call."""
    names = {"prompt_embeds": (batch, 32), "encoder_hidden_states": (batch, 5, 32)}
    return {
        f"{negative}{name}": randn(*shape, seed=i)
        for i, negative in enumerate(("", "negative_"))
        for name, shape in names.items()
    }


class Output:
    """What a language model returns."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class TinyLLaDA(nn.Module):
    """A language model with bidirectional attention, as `LLaDA2Pipeline` calls it.

    Attributes:
        shapes: Of the logits of every call.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, vocabulary: int = 40, width: int = 32) -> None:
        super().__init__()
        self.config = None
        self.embedding, self.places = nn.Embedding(vocabulary, width), nn.Embedding(256, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.lm_head = nn.Linear(width, vocabulary)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Any = None) -> Output:
        """Logits `(B, N, V)`."""
        places = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        hidden = self.embedding(input_ids) + self.places(places)
        padding = None if attention_mask is None else attention_mask == 0
        hidden = hidden + self.attention(hidden, hidden, hidden, key_padding_mask=padding, need_weights=False)[0]
        logits = self.lm_head(4 * hidden).float()
        self.shapes.append(tuple(logits.shape))
        return Output(logits)


def llada2() -> Any:
    """An LLaDA2 pipeline without a tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyLLaDA().eval()
    pipeline = diffusers.LLaDA2Pipeline(model=model, scheduler=diffusers.BlockRefinementScheduler(block_length=8))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
