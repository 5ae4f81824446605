"""The half of a backbone that samples: images through its own diffusers pipeline, each from its own seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Literal, Unpack, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import DiffalignError, brief
from diffalign.pipelines.drawn_noise import NoiseRecord, noise_record, seeded
from diffalign.pipelines.encoding import Encoding
from diffalign.pipelines.settings import SamplingKeywords, SamplingSettings, merged

OutputType = Literal["pil", "pt", "latent"]


class Sampling(Encoding):
    """Sampling of a backbone, from prompts or from what `encode_guided` made of them."""

    @overload
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings | None = None,
        *,
        output_type: Literal["pil"] = "pil",
        **single: Unpack[SamplingKeywords],
    ) -> list[Image.Image]: ...

    @overload
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings | None = None,
        *,
        output_type: Literal["pt", "latent"],
        **single: Unpack[SamplingKeywords],
    ) -> Tensor: ...

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings | None = None,
        *,
        output_type: OutputType = "pil",
        **single: Unpack[SamplingKeywords],
    ) -> list[Image.Image] | Tensor:
        """Sample one image per prompt and seed through the diffusers pipeline, under the current role.

        `settings`, or their fields one by one; a field given beside them takes their place. Image i depends on prompt i
        and seed i: its noise is what `torch.Generator().manual_seed(seed)` on the CPU gives a plain diffusers pipeline.
        Seeds lie in [0, 2**32): torch's CPU generator reads no more bits. Returns PIL images, or a float32 tensor for
        output_type "pt" ([B, 3, H, W] in [0, 1]) and "latent" ([B, C, h, w]).
        """
        self._require("vae")
        self._require("text_encoder")
        if len(prompts) != len(seeds) or not prompts:
            raise DiffalignError(
                f"sample: {len(prompts)} prompts and {len(seeds)} seeds; one seed per prompt is needed"
            )
        chosen = merged(settings, single)
        negatives = self.negative_prompts(chosen.negative_prompt, len(prompts))
        inputs: dict[str, object] = {"prompt": list(prompts)}
        if negatives is not None:
            inputs["negative_prompt"] = negatives
        return self._sample(inputs, seeds, chosen, output_type)

    def edit(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image],
        seeds: Sequence[int],
        settings: SamplingSettings | None = None,
        **single: Unpack[SamplingKeywords],
    ) -> list[Image.Image]:
        """Edit one image per prompt and seed through the diffusers pipeline, under the current role; else as `sample`.

        Raises DiffalignError for a family that takes no image, and for lists of unequal lengths.
        """
        if self.condition is None:
            raise DiffalignError(f"{self.path}: family {self.family} takes no image to edit")
        if not len(prompts) == len(images) == len(seeds) or not prompts:
            raise DiffalignError(
                f"edit: {len(prompts)} prompts, {len(images)} images and {len(seeds)} seeds; one of each is needed"
            )
        chosen = merged(settings, single)
        found: list[Image.Image] = []
        for prompt, image, seed in zip(prompts, images, seeds, strict=True):  # pipelines take one image for all prompts
            try:
                with torch.no_grad():
                    drawn = self._sample({"prompt": [prompt], "image": image}, [seed], chosen, "pil")
            except ValueError as error:  # diffusers refuses images that are too small or too long
                raise DiffalignError(f"edit: image {len(found)} cannot be edited: {brief(error)}") from error
            found += drawn if isinstance(drawn, list) else []
        return found

    @overload
    def sample_encoded(
        self,
        encoded: dict[str, Tensor],
        seeds: Sequence[int],
        settings: SamplingSettings | None = None,
        *,
        output_type: Literal["pil"] = "pil",
        **single: Unpack[SamplingKeywords],
    ) -> list[Image.Image]: ...

    @overload
    def sample_encoded(
        self,
        encoded: dict[str, Tensor],
        seeds: Sequence[int],
        settings: SamplingSettings | None = None,
        *,
        output_type: Literal["pt", "latent"],
        **single: Unpack[SamplingKeywords],
    ) -> Tensor: ...

    @torch.no_grad()
    def sample_encoded(
        self,
        encoded: dict[str, Tensor],
        seeds: Sequence[int],
        settings: SamplingSettings | None = None,
        *,
        output_type: OutputType = "pil",
        **single: Unpack[SamplingKeywords],
    ) -> list[Image.Image] | Tensor:
        """Sample from what `encode_guided` gave, with the text encoders freed; the same images as `sample`.

        The negative prompt is one that was encoded; that of the settings is not read.
        """
        moved = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for name, value in encoded.items()
        }
        return self._sample(self.pipeline_inputs(moved), seeds, merged(settings, single), output_type)

    def _sample(
        self, inputs: dict[str, object], seeds: Sequence[int], settings: SamplingSettings, output_type: OutputType
    ) -> list[Image.Image] | Tensor:
        if output_type not in ("pil", "pt", "latent"):
            raise DiffalignError(f"sample: unknown output_type '{output_type}'; choose pil, pt or latent")
        latents = self._latents(inputs, seeds, settings)
        if output_type == "latent":
            return latents.float()
        pixels = self.decode_latents(latents)
        return pixels if output_type == "pt" else self.to_images(pixels)

    def sample_with_latents(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
    ) -> list[tuple[Image.Image, np.ndarray]]:
        """Sample as `sample` does; return each image with the latent [C, h, w] float32 that it was decoded from."""
        found = self.sample(prompts, seeds, settings, output_type="latent")
        return list(zip(self.to_images(self.decode_latents(found)), found.cpu().numpy(), strict=True))

    def noise_record(self, settings: SamplingSettings) -> NoiseRecord:
        """Return what the provenance of images says about the noise that these settings draw them from."""
        return noise_record(self.pipeline.scheduler, self.family, self._noise_shape(settings))

    def _pixels(self, settings: SamplingSettings) -> tuple[int, int]:
        return settings.height or self.default_resolution, settings.width or self.default_resolution

    def _noise_shape(self, settings: SamplingSettings) -> tuple[int, int, int]:
        height, width = self._pixels(settings)
        return self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def _latents(self, inputs: Mapping[str, object], seeds: Sequence[int], settings: SamplingSettings) -> Tensor:
        """Run the pipeline on `inputs`, its arguments for the prompts: latents [B, C, h, w] as the trunk has them.

        The noise of image i is what `torch.Generator().manual_seed(seed i)` on the CPU gives a plain diffusers pipeline.
        Raises DiffalignError for seeds, steps and sizes that the model cannot have.
        """
        generators = seeded(seeds)
        if settings.steps < 1:
            raise DiffalignError(f"sample: {settings.steps} sampling steps asked for; at least 1 is needed")
        height, width = self._pixels(settings)
        multiple, side = self.pixel_multiple, self.vae_scale_factor
        if height % multiple or width % multiple:
            raise DiffalignError(
                f"sample: {height}x{width} pixels are not multiples of {multiple}, which this model needs"
            )
        shape = (1, *self._noise_shape(settings))
        noise = torch.cat([torch.randn(shape, generator=g, dtype=torch.float32) for g in generators])
        # After full fine-tuning of a bf16 checkpoint the trunk is float32 while the encoders are not.
        mixed = self.base_dtype(self.pipeline_trunk) != self.dtype
        kept = torch.float32 if self.latents_in_float32 else self.dtype
        with torch.autocast(self.device.type, dtype=self.dtype) if mixed else nullcontext():
            latents = self.pipeline(
                **inputs,
                latents=self.to_pipeline(noise.to(self.device, kept)),
                generator=generators,
                num_inference_steps=settings.steps,
                height=height,
                width=width,
                output_type="latent",
                **self.guidance_arguments(settings.guidance_scale),
                **self.sampling_options(),
            ).images
        return self.from_pipeline(latents, height // side, width // side)
