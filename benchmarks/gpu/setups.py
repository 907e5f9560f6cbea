"""Ways to run a model for the stage `models`: methods of this library, and the peers' caches at equal schedules.

Caches compute one step and reuse three, whatever their signal says: on random weights it says nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import maskaccel
from maskaccel import methods as m

if TYPE_CHECKING:
    from denoise import Denoiser

ALWAYS = 1e6  # a threshold that every step stays below
INTERVAL = 4
# Schedules: one step computed and three reused, behind three at the start; nothing computed but the first step; held
# attention.
QUARTER, HITS, ATTENTION = "1 in 4", "the first", "attention held"

Activity = Callable[[], dict[str, Any]]
Apply = Callable[["Denoiser"], Activity]


@dataclass(frozen=True)
class Setup:
    """One way to run a model.

    Attributes:
        name: As reports show it.
        apply: Puts it on a pipeline of its own, for good; gives what tells, afterwards, what it did.
        peer: Not of this library.
        compiled: The repeated blocks are compiled, too.
        schedule: Which steps compute all blocks; nothing said: all. Speed is compared between equal schedules, and
            with runs that compute all.
        needs: A package without which it is left out.
    """

    name: str
    apply: Apply
    peer: bool = True
    compiled: bool = False
    schedule: str = ""
    needs: str = "diffusers"


def _nothing(pipe: Denoiser) -> Activity:
    return dict


def ours(*methods: Any, compiled: bool = False, schedule: str = "", name: str = "") -> Setup:
    """Methods of this library, patched together."""

    def apply(pipe: Denoiser) -> Activity:
        patch = maskaccel.patch(pipe, list(methods))

        def activity() -> dict[str, Any]:
            report = patch.report().as_dict()
            return {key: report[key] for key in ("backend", "activity", "skipped", "notes")}

        return activity

    name = name or " + ".join(method.name for method in methods)
    return Setup(name + " + compile" * compiled, apply, peer=False, compiled=compiled, schedule=schedule)


# ------------------------------------------------------------------------------------------------------------ peers
def _cudnn(pipe: Denoiser) -> Activity:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    inner = pipe.transformer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(order, set_priority=True):
            return inner(*args, **kwargs)

    pipe.transformer.forward = forward
    return dict


def diffusers_cache(
    name: str, config: Callable[[Any, Denoiser], Any], schedule: str = QUARTER, compiled: bool = False
) -> Setup:
    """A cache of diffusers; `config` makes its configuration from the module `diffusers.hooks` and the pipeline."""

    def apply(pipe: Denoiser) -> Activity:
        from diffusers import hooks

        pipe.transformer.enable_cache(config(hooks, pipe))
        return dict

    return Setup(f"diffusers {name}" + " + compile" * compiled, apply, compiled=compiled, schedule=schedule)


def cache_dit(taylor: bool, compiled: bool = False) -> Setup:
    """DBCache of one leading block that always hits, at most three times in a row, as it is or with its TaylorSeer."""

    def apply(pipe: Denoiser) -> Activity:
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
        import cache_dit
        from cache_dit.caching import BlockAdapterRegister

        adapter = BlockAdapterRegister.get_adapter(pipe)
        adapter.has_separate_cfg = False
        cache_dit.enable_cache(
            adapter,
            cache_config=cache_dit.DBCacheConfig(
                Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=ALWAYS, max_warmup_steps=3,
                max_continuous_cached_steps=INTERVAL - 1, enable_separate_cfg=False,
            ),
            calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None,
        )  # fmt: skip
        return dict

    name = "cache-dit DBCache" + ", TaylorSeer" * taylor + " + compile" * compiled
    return Setup(name, apply, compiled=compiled, schedule=QUARTER, needs="cache_dit")


def taylorseer(compiled: bool = False) -> Setup:
    """Diffusers' TaylorSeer where it is cheapest: forecasts of the model's output alone."""

    def config(hooks: Any, pipe: Denoiser) -> Any:
        return hooks.TaylorSeerCacheConfig(
            cache_interval=INTERVAL, max_order=1, disable_cache_before_step=3, use_lite_mode=True
        )

    return diffusers_cache("TaylorSeer", config, compiled=compiled)


def _broadcast(hooks: Any, pipe: Denoiser) -> Any:
    return hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 950),
        cross_attention_block_skip_range=6, cross_attention_timestep_skip_range=(100, 950),
        current_timestep_callback=pipe.timestep,
    )  # fmt: skip


def caches(steps: int) -> tuple[Setup, ...]:
    """Caches of runs of so many steps, ours beside the peers'."""
    often, ones = INTERVAL - 1, (1.0,) * steps

    def magnitudes(hooks: Any, pipe: Denoiser) -> Any:
        return hooks.MagCacheConfig(
            threshold=ALWAYS, max_skip_steps=often, retention_ratio=3 / steps, num_inference_steps=steps,
            mag_ratios=torch.tensor(ones),
        )  # fmt: skip

    return (
        taylorseer(),
        cached(SEER),
        cache_dit(False),
        cache_dit(True),
        cached(m.FBCache(threshold=ALWAYS, max_consecutive=often, first=3)),
        cached(m.TeaCache(threshold=ALWAYS, max_consecutive=often, first=3)),
        cached(m.FORA(interval=INTERVAL, first=3, level="stack")),
        diffusers_cache("MagCache", magnitudes),
        cached(m.MagCache(threshold=ALWAYS, max_consecutive=often, retention=3 / steps, ratios=ones)),
        diffusers_cache("FirstBlockCache", lambda hooks, _: hooks.FirstBlockCacheConfig(threshold=ALWAYS), HITS),
        ours(m.FBCache(threshold=ALWAYS), schedule=HITS, name="FBCache, hits alone"),
        diffusers_cache("PyramidAttentionBroadcast", _broadcast, ATTENTION),
        ours(m.PAB(spatial=2, cross=6, low=100.0, high=950.0), schedule=ATTENTION),
    )


def cached(*methods: Any, compiled: bool = False) -> Setup:
    """Methods of this library with the schedule of the caches."""
    return ours(*methods, compiled=compiled, schedule=QUARTER)


def composed(*sparse: Any) -> tuple[Setup, ...]:
    """Our families at once, beside the strongest compositions of the peers."""
    return (
        taylorseer(compiled=True),
        cache_dit(True, compiled=True),
        cached(m.FusedAdaLN(), SEER),
        cached(m.FusedAdaLN(), *sparse, SEER),
        cached(m.FusedAdaLN(), *sparse, SEER, compiled=True),
    )


EAGER = Setup("eager", _nothing)
COMPILE = Setup("torch.compile", _nothing, compiled=True)
CUDNN = Setup("eager, cuDNN's attention", _cudnn)
FUSED = ours(m.FusedAdaLN())
FUSED_COMPILE = ours(m.FusedAdaLN(), compiled=True)
SEER = m.TaylorSeer(interval=INTERVAL, first=3)
# A quarter of the tiles, whatever the queries and keys are.
TOP = m.SpargeAttn(similarity=-1.0, top_k=0.25, block=(128, 128))
# A fifth of the tiles of Wan's 480p grid, which no tile divides.
TILE = m.SlidingTile(window=(3, 3, 5), tile=(4, 8, 4))
