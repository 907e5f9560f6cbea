"""Denoising runs of FLUX- and Wan-shaped models with random weights.

Weights are normal with the variance that keeps activations at their size, so gates, attention and modulation are all at
work, in the layout and dtypes of the published models. What such a model paints means nothing: the error of a run says
how far a method departs from the eager run on a model that nobody trained, and no more than that.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, WanTransformer3DModel
from torch import Tensor, nn

_FLUX = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
_WAN = {"in_channels": 16, "out_channels": 16, "attention_head_dim": 128, "text_dim": 4096}
_TINY_FLUX = {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2, "attention_head_dim": 32,
              "axes_dims_rope": (8, 12, 12), "joint_attention_dim": 48, "pooled_projection_dim": 32}  # fmt: skip
_TINY_WAN = {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "text_dim": 48}


@dataclass(frozen=True)
class Shape:
    """A model and the latents that it denoises.

    Attributes:
        model: The class of diffusers.
        config: Its options.
        grid: Latent tokens of each axis: rows and columns, or frames, rows and columns.
        text: Text tokens.
        tiny: Options and grid of a dry run.
    """

    model: type[nn.Module]
    config: dict[str, Any]
    grid: tuple[int, ...]
    text: int
    tiny: tuple[dict[str, Any], tuple[int, ...]] = field(repr=False)

    def small(self) -> Shape:
        """The same model at the size of a dry run."""
        config, grid = self.tiny
        return Shape(self.model, {**self.config, **config}, grid, 16, self.tiny)


def _flux(side: int) -> Shape:
    # A side of the dry run that no tile divides, as in the real ones with text.
    return Shape(FluxTransformer2DModel, _FLUX, (side, side), 512, (_TINY_FLUX, (12, 12)))


def _wan(config: dict[str, Any]) -> Shape:
    return Shape(WanTransformer3DModel, {**_WAN, **config}, (21, 30, 52), 512, (_TINY_WAN, (5, 6, 10)))


SHAPES = {
    "FLUX 1024 px": _flux(64),
    "FLUX 2048 px": _flux(128),
    "Wan 1.3B 480p": _wan({"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}),
    "Wan 14B 480p": _wan({"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}),
}


# ----------------------------------------------------------------------------------------------------------- models
def build(shape: Shape, device: str, seed: int = 0) -> nn.Module:
    """The model with random weights, made on its device: bf16, and fp32 where the model keeps fp32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = shape.model(**shape.config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(seed)
    kept = set(model._keep_in_fp32_modules or ())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if kept & set(name.split(".")):
                p.data = p.data.float()
            if name.endswith("scale_shift_table"):
                p.normal_(std=p.shape[-1] ** -0.5, generator=generator)
            elif p.ndim > 1:
                p.normal_(std=math.prod(p.shape[1:]) ** -0.5, generator=generator)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
    return model.requires_grad_(False).eval()


def twin(model: nn.Module) -> nn.Module:
    """Another model with the same weights, not copies of them: to be patched on its own."""
    shared = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def conditions(shape: Shape, device: str, seed: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """The noise that a run begins with, and what the model is given beside it in every call."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)

    if shape.model is WanTransformer3DModel:
        frames, rows, columns = shape.grid
        text = randn(1, shape.text, shape.config["text_dim"])
        return randn(1, 16, frames, 2 * rows, 2 * columns), {"encoder_hidden_states": text}
    row, column = torch.meshgrid(*(torch.arange(n, device=device) for n in shape.grid), indexing="ij")
    places = torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1)
    return randn(1, math.prod(shape.grid), 64), {
        "encoder_hidden_states": randn(1, shape.text, shape.config.get("joint_attention_dim", 4096)),
        "pooled_projections": randn(1, shape.config.get("pooled_projection_dim", 768)),
        "guidance": torch.full((1,), 3.5, device=device),
        "img_ids": places.to(torch.bfloat16),
        "txt_ids": torch.zeros(shape.text, 3, device=device, dtype=torch.bfloat16),
    }


# ------------------------------------------------------------------------------------------------------------- runs
class Denoiser(DiffusionPipeline):
    """The loop of a pipeline without its encoders: one guidance branch, Euler steps of flow matching."""

    def __init__(self, transformer: nn.Module, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)
        self.times: list[float] = []

    @torch.no_grad()
    def __call__(self, latents: Tensor, inputs: dict[str, Tensor], steps: int,
                 mark: Callable[[], None] = lambda: None) -> Tensor:  # fmt: skip
        """Denoise `latents` in so many steps; `mark` is called before each step and after the last."""
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=latents.device)
        self.scheduler.set_begin_index(0)  # else the first step looks its timestep up, and waits for the device
        self.times = np.linspace(1000.0, 1000 / steps, steps).tolist()
        unit = 1000 if isinstance(self.transformer, FluxTransformer2DModel) else 1
        with self.progress_bar(total=steps) as bar:
            for t in self.scheduler.timesteps:
                mark()
                with self.transformer.cache_context("cond"):
                    output = self.transformer(
                        hidden_states=latents, timestep=t.expand(len(latents)) / unit, return_dict=False, **inputs
                    )[0]
                latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
                bar.update()
        mark()
        self.maybe_free_model_hooks()
        return latents

    def timestep(self) -> float:
        """The timestep of the step under way, known to the host."""
        return self.times[self.scheduler.step_index or 0]


def denoiser(model: nn.Module) -> Denoiser:
    """A pipeline around a model. Its class is its own, since peers replace methods of the class and go by its name."""
    kind = type(f"{type(model).__name__.partition('Transformer')[0]}Denoiser", (Denoiser,), {})
    return kind(model, FlowMatchEulerDiscreteScheduler())


class Marks:
    """When each step of a run began: events of the device, or the clock on a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.events: list[Any] = []

    def __call__(self) -> None:
        """Note the moment."""
        if not self.cuda:
            self.events.append(time.perf_counter() * 1e3)
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)

    def steps(self) -> list[float]:
        """Milliseconds of each step."""
        if not self.cuda:
            return [b - a for a, b in itertools.pairwise(self.events)]
        self.events[-1].synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(self.events)]


def timed(pipe: Denoiser, latents: Tensor, inputs: dict[str, Tensor], steps: int) -> dict[str, Any]:
    """One run: its latents, milliseconds of its steps, and the most memory it took beyond what was there before."""
    device = latents.device.type
    held = 0
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    marks = Marks(device)
    result = pipe(latents, inputs, steps, marks)
    milliseconds = marks.steps()
    peak = torch.cuda.max_memory_allocated() - held if device == "cuda" else None
    return {"latents": result, "step_ms": milliseconds, "run_ms": sum(milliseconds), "peak_bytes": peak}


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted|, of all elements together."""
    got, wanted = got.double(), wanted.double()
    return ((got - wanted).norm() / wanted.norm()).item()
