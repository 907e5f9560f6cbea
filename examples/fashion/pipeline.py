"""The sampling pipeline of the example model: class-conditional rectified flow with classifier-free guidance.

Example:
    pipe = FashionPipeline.from_pretrained("examples/fashion/weights")
    images = pipe([0, 7, 8], seeds=[1, 2, 3]).images
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

OUTPUT_TYPES = ("pil", "pt", "np")


class FashionPipeline(DiffusionPipeline):
    """Samples 32x32 grey images of the ten Fashion-MNIST classes.

    The last row of the label table (`transformer.config.num_embeds_ada_norm`) means "no class". Both guidance branches
    run in one call of the transformer, as the batch `[class; no class]`.

    Args:
        transformer: The velocity network: reads x_t, 1000 t and a label, predicts e - x for x_t = (1 - t) x + t e.
        scheduler: Steps from t = 1 (noise) to t = 0 (image).
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: DiTTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @property
    def num_classes(self) -> int:
        """How many classes the label table knows, the "no class" row not counted."""
        return int(self.transformer.config.num_embeds_ada_norm)

    def _check_labels(self, class_labels: int | Sequence[int] | torch.Tensor) -> list[int]:
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.tolist()
        labels = [class_labels] if isinstance(class_labels, int) else list(class_labels)
        for label in labels:
            if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < self.num_classes:
                raise ValueError(f"class_labels must be ints from 0 to {self.num_classes - 1}, got {label!r}")
        if not labels:
            raise ValueError("class_labels is empty: pass at least one class")
        return labels

    def _noise(
        self,
        count: int,
        generator: torch.Generator | list[torch.Generator] | None,
        seeds: Sequence[int] | None,
    ) -> torch.Tensor:
        if generator is not None and seeds is not None:
            raise ValueError("pass generator or seeds, not both")
        if seeds is not None:
            if len(seeds) != count:
                raise ValueError(f"seeds must hold one int for each of the {count} class_labels, got {len(seeds)}")
            # On the CPU always, one generator an image: the same seed gives the same noise on every device and in
            # every batch.
            generator = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        elif isinstance(generator, list) and len(generator) != count:
            raise ValueError(
                f"generator must be one torch.Generator or a list of {count}, one for each of the class_labels, "
                f"got a list of {len(generator)}"
            )
        config = self.transformer.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | torch.Tensor,
        guidance_scale: float = 2.0,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: Sequence[int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[list[Image.Image] | np.ndarray | torch.Tensor]:
        """Sample one image for each label.

        Args:
            class_labels: The classes, 0 to 9; one int, a list or a 1-d tensor.
            guidance_scale: 1.0 turns guidance (and the second half of the batch) off.
            num_inference_steps: Euler steps, at least 1.
            generator: One generator for the whole batch, or a list with one an image.
            seeds: One int an image instead of `generator`; the image then does not depend on how a list of labels was
                split into batches (up to rounding).
            output_type: `"pil"` (list of images of mode L), `"pt"` (float32 `(n, 1, 32, 32)` in 0..1) or `"np"`
                (float32 `(n, 32, 32, 1)` in 0..1).
            return_dict: False returns the plain tuple `(images,)`.

        Returns:
            The images.

        Raises:
            ValueError: An argument is out of its range; the message names it.
        """
        labels = self._check_labels(class_labels)
        if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be an int of at least 1, got {num_inference_steps!r}")
        if not guidance_scale >= 0:
            raise ValueError(f"guidance_scale must be 0 or more, got {guidance_scale!r}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")

        device, dtype = self._execution_device, self.transformer.dtype
        latents = self._noise(len(labels), generator, seeds)
        classes = torch.tensor(labels, device=device)
        guided = guidance_scale != 1.0
        if guided:
            classes = torch.cat([classes, torch.full_like(classes, self.num_classes)])

        self.scheduler.set_timesteps(
            sigmas=np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps), device=device
        )
        with self.progress_bar(total=num_inference_steps) as bar:
            for t in self.scheduler.timesteps:
                inputs = torch.cat([latents, latents]) if guided else latents
                velocity = self.transformer(
                    inputs.to(dtype), timestep=t.expand(len(inputs)), class_labels=classes
                ).sample.float()
                if guided:
                    with_class, without = velocity.chunk(2)
                    velocity = torch.lerp(without, with_class, guidance_scale)
                latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
                bar.update()

        images = (latents / 2 + 0.5).clamp(0, 1)
        output: list[Image.Image] | np.ndarray | torch.Tensor = images
        if output_type != "pt":
            output = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            output = [Image.fromarray((pixels[..., 0] * 255).round().astype(np.uint8), mode="L") for pixels in output]
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=output) if return_dict else (output,)
