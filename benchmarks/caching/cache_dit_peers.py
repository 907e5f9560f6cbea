"""cache-dit's DBCache, calibrators and step masks on the example's transformer, by its `BlockAdapter`.

Its DBPrune is left out: in 1.5.3 its wrapper of blocks that take and return the hidden states alone, as these do, calls
a helper with an argument too many and raises.
"""

from __future__ import annotations

import os
from typing import Any

from .model import FashionPipeline, Setting

WARMUP = 4  # of 50 steps; its default of 8 is for 28 to 50 steps


def _enable(pipe: FashionPipeline, cache_config: Any, calibrator: str | None) -> None:
    import cache_dit
    from cache_dit.caching.patch_functors import DiTPatchFunctor

    # It replaces `__call__` of the pipeline's class: give it a class that no other pipeline has.
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {})
    calibrators: dict[str | None, Any] = {
        None: lambda: None,
        "taylor1": lambda: cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1),
        "taylor2": lambda: cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=2),
        "foca": cache_dit.FoCaCalibratorConfig,
        "dmd": cache_dit.DMDCalibratorConfig,
    }
    cache_dit.enable_cache(
        # The adapter that it registers for diffusers' DiTPipeline, with this pipeline.
        cache_dit.BlockAdapter(
            pipe=pipe, transformer=pipe.transformer, blocks=pipe.transformer.transformer_blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_3, patch_functor=DiTPatchFunctor(),
            check_forward_pattern=True, has_separate_cfg=False,
        ),
        cache_config=cache_config,
        calibrator_config=calibrators[calibrator](),
    )  # fmt: skip


def dbcache(
    pipe: FashionPipeline,
    setting: Setting,
    *,
    threshold: float = 0.08,
    Fn: int = 1,
    Bn: int = 0,
    warmup: int = WARMUP,
    continuous: int = -1,
    calibrator: str | None = None,
) -> None:
    """DBCache: the first `Fn` blocks decide for those between, the last `Bn` always run."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=Fn, Bn_compute_blocks=Bn, residual_diff_threshold=threshold, max_warmup_steps=warmup,
        max_continuous_cached_steps=continuous, enable_separate_cfg=False,
    )  # fmt: skip
    _enable(pipe, config, calibrator)


def step_mask(
    pipe: FashionPipeline,
    setting: Setting,
    *,
    policy: str,
    Fn: int = 1,
    Bn: int = 0,
    calibrator: str | None = None,
) -> None:
    """Its step computation masks ("slow", "medium", "fast", "ultra"), static: no signal is looked at."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=Fn, Bn_compute_blocks=Bn, max_warmup_steps=1, enable_separate_cfg=False,
        steps_computation_mask=cache_dit.steps_mask(total_steps=setting.steps, mask_policy=policy),
        steps_computation_policy="static",
    )  # fmt: skip
    _enable(pipe, config, calibrator)
