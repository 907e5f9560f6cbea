"""diffusers' own caches on the example's transformer, set up the way its supported pipelines set them up.

`DiTTransformer2DModel` has no `CacheMixin` and the example's pipeline opens no cache context. `_cacheable` adds what
diffusers' supported models and pipelines have: the mixin, whose state `maybe_free_model_hooks` resets after every call
of the pipeline, and one context around each call of the model (both guidance branches are one batch: one name does).
"""

from __future__ import annotations

import ast
import contextlib
import io
from typing import Any

import torch
from diffusers import hooks
from diffusers.models.cache_utils import CacheMixin

from .model import FashionPipeline, Setting, sample

# Images the calibration samples: seeds that no evaluation uses.
_CALIBRATION_SEED = 1_000_000


def _cacheable(pipe: FashionPipeline, *, fields: bool = False, unconditional_first: bool = False) -> None:
    """Make `pipe.transformer.enable_cache` and `cache_context` work.

    Args:
        pipe: The pipeline.
        fields: Say in the context which step it is (SeaCache asks for it).
        unconditional_first: Swap the halves of the batch around each call: FasterCache expects them the other way
            round.
    """
    scheduler, base = pipe.scheduler, type(pipe.transformer)

    class Cacheable(base, CacheMixin):
        def __call__(self, hidden_states: torch.Tensor, **inputs: torch.Tensor) -> Any:
            inputs["hidden_states"] = hidden_states
            step = scheduler.step_index or 0
            context = {"step_index": step, "sigma": float(scheduler.sigmas[step]),
                       "num_inference_steps": len(scheduler.timesteps)} if fields else {}  # fmt: skip
            if unconditional_first:
                inputs = {name: _swap(tensor) for name, tensor in inputs.items()}
            with self.cache_context("batched", **context):
                output = super().__call__(**inputs)
            if unconditional_first:
                output.sample = _swap(output.sample)
            return output

    Cacheable.__name__ = base.__name__
    pipe.transformer.__class__ = Cacheable


def _swap(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.roll(len(tensor) // 2, 0)


def _timestep(pipe: FashionPipeline) -> Any:
    scheduler = pipe.scheduler
    return lambda: float(scheduler.timesteps[scheduler.step_index or 0])


def first_block_cache(pipe: FashionPipeline, setting: Setting, *, threshold: float) -> None:
    """FirstBlockCache: all blocks but the first are skipped while the first block's residual changes little."""
    _cacheable(pipe)
    pipe.transformer.enable_cache(hooks.FirstBlockCacheConfig(threshold=threshold))


def taylorseer(
    pipe: FashionPipeline,
    setting: Setting,
    *,
    interval: int,
    order: int = 1,
    first: int = 3,
    sites: str = "modules",
    dtype: str = "bfloat16",
) -> None:
    """TaylorSeer: forecasts between every `interval`-th step.

    Its default patterns match no module of this model, so they are given: `sites="modules"` forecasts the attention and
    MLP of every block as in the paper, `sites="model"` the last projection alone (what its lite mode does elsewhere).
    """
    _cacheable(pipe)
    sited: dict[str, Any] = {
        "modules": {"cache_identifiers": [r"transformer_blocks\.\d+\.(attn1|ff)"]},
        "model": {"cache_identifiers": ["proj_out_2"], "skip_predict_identifiers": [r"transformer_blocks\.\d+"]},
    }[sites]
    pipe.transformer.enable_cache(
        hooks.TaylorSeerCacheConfig(
            cache_interval=interval, max_order=order, disable_cache_before_step=first,
            taylor_factors_dtype=getattr(torch, dtype), **sited,
        )
    )  # fmt: skip


def mag_cache(
    pipe: FashionPipeline, setting: Setting, *, threshold: float, skips: int = 3, retention: float = 0.2
) -> None:
    """MagCache, with the magnitude ratios of this model from its own calibration run (one batch, other seeds)."""
    _cacheable(pipe)
    fixed = {"num_inference_steps": setting.steps, "max_skip_steps": skips, "retention_ratio": retention}
    printed = io.StringIO()
    pipe.transformer.enable_cache(hooks.MagCacheConfig(calibrate=True, **fixed))
    with contextlib.redirect_stdout(printed):
        sample(pipe, setting, range(_CALIBRATION_SEED, _CALIBRATION_SEED + 10))
    pipe.transformer.disable_cache()
    (ratios,) = (ast.literal_eval(line) for line in printed.getvalue().splitlines() if line.startswith("[1.0, "))
    pipe.transformer.enable_cache(hooks.MagCacheConfig(threshold=threshold, mag_ratios=ratios, **fixed))


def sea_cache(
    pipe: FashionPipeline,
    setting: Setting,
    *,
    threshold: float,
    order: int = 1,
    consecutive: int = 2,
    power: float = 3.0,
) -> None:
    """SeaCache: a residual of all blocks, reused while the spectrally filtered latents have moved little."""
    _cacheable(pipe, fields=True)

    def latents(_model: torch.nn.Module, _args: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        images = inputs["hidden_states"].chunk(2)[0] if setting.guidance != 1.0 else inputs["hidden_states"]
        return list(images.unsqueeze(2))  # (channels, 1 frame, height, width) each

    pipe.transformer.enable_cache(
        hooks.SeaCacheConfig(
            threshold=threshold, residual_order=order, max_consecutive_cached=consecutive, power_exp=power,
            raw_vision_callback=latents,
        )
    )  # fmt: skip


def pyramid_attention_broadcast(
    pipe: FashionPipeline, setting: Setting, *, interval: int, low: float = 100, high: float = 800
) -> None:
    """Pyramid Attention Broadcast: attention outputs are held, MLPs always run."""
    _cacheable(pipe)
    pipe.transformer.enable_cache(
        hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=interval, spatial_attention_timestep_skip_range=(low, high),
            current_timestep_callback=_timestep(pipe),
        )
    )  # fmt: skip


def faster_cache(
    pipe: FashionPipeline,
    setting: Setting,
    *,
    attention: int = 2,
    unconditional: int = 5,
    start: float = 681,
    unconditional_start: float = 641,
    weight: float = 0.5,
) -> None:
    """FasterCache: the unconditional branch from the conditional one, attention extrapolated."""
    _cacheable(pipe, unconditional_first=True)
    pipe.transformer.enable_cache(
        hooks.FasterCacheConfig(
            spatial_attention_block_skip_range=attention, spatial_attention_timestep_skip_range=(-1, start),
            unconditional_batch_skip_range=unconditional,
            unconditional_batch_timestep_skip_range=(-1, unconditional_start),
            attention_weight_callback=lambda _: weight, tensor_format="BCHW",
            current_timestep_callback=_timestep(pipe),
            _unconditional_conditional_input_kwargs_identifiers=["hidden_states", "timestep", "class_labels"],
        )
    )  # fmt: skip
