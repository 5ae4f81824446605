"""Draw images from any model of this package, and from one that it only draws from.

A `Generator` has one method that matters, `draw`. Families with a backbone are drawn from through it, so that a LoRA or the
weights of a run apply; Stable Cascade is a plain diffusers pipeline.
"""

from __future__ import annotations

import gc
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np
import torch
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.pipelines.base import Backbone
from diffalign.pipelines.checkpointing import Checkpointing
from diffalign.pipelines.drawn_noise import NoiseRecord, seeded
from diffalign.pipelines.hub import find_index
from diffalign.pipelines.loading import BACKBONES, load_backbone, model_index, read_index
from diffalign.pipelines.lora_file import TextEncoders
from diffalign.pipelines.options import Value
from diffalign.pipelines.plain_pipelines import cascade_decoder, cascade_prior, find_source, load_pipeline
from diffalign.pipelines.prompt_length import count_longer
from diffalign.pipelines.settings import SamplingKeywords, SamplingSettings, merged
from diffalign.pipelines.source import Source

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

OURS = {
    "self",
    "kwargs",
    "prompt",
    "generator",
    "output_type",
    "num_inference_steps",
    "guidance_scale",
    "height",
    "width",
}
PRIOR = "stabilityai/stable-cascade-prior"
Drawing = tuple[Image.Image, np.ndarray | None]
"""An image, and its latent [C, h, w] float32 if it was asked for."""


class Generator(ABC):
    """A loaded model that draws images. Image i depends on prompt i and seed i, and in its last bits on the batch."""

    pipeline: DiffusionPipeline
    source: Source
    dtype: torch.dtype

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings | None = None,
        *,
        options: Mapping[str, object] | None = None,
        latents: bool = False,
        **single: Unpack[SamplingKeywords],
    ) -> list[Drawing]:
        """Draw one image per prompt and seed (below 2^32), with its latent [C, h, w] float32 if `latents`.

        `settings`, or their fields one by one. `options`: further arguments of a plain pipeline. Raises DiffalignError
        where the model has no such thing.
        """
        return self._draw(list(prompts), seeds, merged(settings, single), options or {}, latents)

    @abstractmethod
    def _draw(
        self,
        prompts: list[str],
        seeds: Sequence[int],
        settings: SamplingSettings,
        options: Mapping[str, object],
        latents: bool,
    ) -> list[Drawing]:
        """Draw as `draw` says."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """The number of tokens of a prompt that the model reads; the rest has no effect."""

    @abstractmethod
    def count_cut(self, prompts: Sequence[str]) -> int:
        """Return how many distinct prompts are longer than `longest` tokens."""

    @abstractmethod
    def load_weights(self, folder: Path) -> None:
        """Load a LoRA; with a backbone, anything that `Backbone.load_weights` takes."""

    def facts(self) -> dict[str, str | None]:
        """Return what decides the images besides the arguments of `draw`."""
        return {
            "model": self.source.path,
            "revision": self.source.revision,
            "fingerprint": self.source.fingerprint(str(self.dtype)),
            "pipeline": type(self.pipeline).__name__,
            "scheduler": type(self.pipeline.scheduler).__name__,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def noise_record(self, settings: SamplingSettings) -> NoiseRecord:
        """Return what the provenance of images says about the noise that these settings draw them from."""
        name = type(self.pipeline.scheduler).__name__
        reason = f"{type(self.pipeline).__name__} draws its noise itself"
        return {"exact": False, "family": "", "shape": [], "sampler": name, "reason": reason}

    def close(self) -> None:
        """Free the model's memory."""
        del self.pipeline
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class BackboneGenerator(Generator):
    """A model that this package can train."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.pipeline = backbone, backbone.pipeline
        self.source, self.dtype = backbone.source, backbone.dtype

    def _draw(
        self,
        prompts: list[str],
        seeds: Sequence[int],
        settings: SamplingSettings,
        options: Mapping[str, object],
        latents: bool,
    ) -> list[Drawing]:
        if options:
            raise DiffalignError(f"{self.source.path}: options are for pipelines without a backbone; leave them out")
        if not latents:
            return [(image, None) for image in self.backbone.sample(prompts, seeds, settings)]
        drawn: list[Drawing] = list(self.backbone.sample_with_latents(prompts, seeds, settings))
        return drawn

    @property
    def longest(self) -> int:
        return self.backbone.longest

    def count_cut(self, prompts: Sequence[str]) -> int:
        return self.backbone.count_cut(prompts)

    def facts(self) -> dict[str, str | None]:
        # By this, training knows whether stored latents are its own VAE's.
        return super().facts() | {"vae": self.backbone.vae_fingerprint()}

    def noise_record(self, settings: SamplingSettings) -> NoiseRecord:
        return self.backbone.noise_record(settings)

    def load_weights(self, folder: Path) -> None:
        self.backbone.load_weights(folder)

    def close(self) -> None:
        del self.backbone
        super().close()


class PlainGenerator(Generator):
    """A diffusers pipeline as it is: `pipeline(prompt=..., generator=[one a image])`."""

    def __init__(self, pipeline: DiffusionPipeline, source: Source, dtype: torch.dtype) -> None:
        self.pipeline, self.source, self.dtype = pipeline, source, dtype

    def _draw(
        self,
        prompts: list[str],
        seeds: Sequence[int],
        settings: SamplingSettings,
        options: Mapping[str, object],
        latents: bool,
    ) -> list[Drawing]:
        if latents:
            raise DiffalignError(
                f"{self.source.path} has no backbone here, so its latents are of no use; latents=false"
            )
        # Pipelines may swallow arguments that they do not know.
        unknown = sorted(set(options) - self.options())
        if unknown:
            raise DiffalignError(
                f"{self.source.path}: options.{unknown[0]} is unknown; there are {', '.join(sorted(self.options()))}"
            )
        arguments: dict[str, object] = {
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            **options,
        }
        if settings.negative_prompt is not None:
            arguments["negative_prompt"] = [settings.negative_prompt] * len(prompts)
        if settings.height is not None:
            arguments |= {"height": settings.height, "width": settings.width}
        with torch.no_grad():
            return [(image, None) for image in self._call(prompts, seeded(seeds), arguments)]

    @property
    def longest(self) -> int:
        # Where a pipeline says how many tokens it reads, that is less than its tokenizer could.
        own = inspect.signature(type(self.pipeline).__call__).parameters.get("max_sequence_length")
        return int(own.default if own is not None else self.pipeline.tokenizer.model_max_length)

    def count_cut(self, prompts: Sequence[str]) -> int:
        return count_longer(self.pipeline.tokenizer, prompts, self.longest)

    def options(self) -> set[str]:
        """Return the names that `options` of `draw` may hold."""
        return set(inspect.signature(type(self.pipeline).__call__).parameters) - OURS

    def _call(
        self, prompts: list[str], generators: list[torch.Generator], arguments: dict[str, object]
    ) -> list[Image.Image]:
        images: list[Image.Image] = self.pipeline(
            prompt=prompts, generator=generators, output_type="pil", **arguments
        ).images
        return images

    def load_weights(self, folder: Path) -> None:
        raise DiffalignError(
            f"weights {folder}: {self.source.path} is only drawn from, and diffusers reads no LoRA for it; leave weights out"
        )


class CascadeGenerator(PlainGenerator):
    """Stable Cascade: a prior, with `steps` and `guidance_scale`, then a decoder (`decoder_steps`, `decoder_guidance`)."""

    def __init__(
        self, prior: DiffusionPipeline, decoder: DiffusionPipeline, source: Source, dtype: torch.dtype
    ) -> None:
        super().__init__(decoder, source, dtype)
        self.prior = prior

    def _call(
        self, prompts: list[str], generators: list[torch.Generator], arguments: dict[str, object]
    ) -> list[Image.Image]:
        first = dict(arguments)
        second = {
            "num_inference_steps": first.pop("decoder_steps", 10),
            "guidance_scale": first.pop("decoder_guidance", 0.0),
        }
        if "negative_prompt" in first:
            second["negative_prompt"] = first["negative_prompt"]
        found = self.prior(prompt=prompts, generator=generators, output_type="pt", **first)
        # The prior rounds the size of its latents; both stages then run in the decoder's number type.
        embeddings = found.image_embeddings.to(self.pipeline.decoder.dtype)
        images: list[Image.Image] = self.pipeline(
            image_embeddings=embeddings, prompt=prompts, generator=generators, output_type="pil", **second
        ).images
        return images

    def options(self) -> set[str]:
        return {"decoder_steps", "decoder_guidance"}

    def close(self) -> None:
        del self.prior
        super().close()


def load_generator(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    variant: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    config: str | None = None,
    prior: str | None = None,
    attention: str = "sdpa",
    gradient_checkpointing: Checkpointing = False,
    quantize: str = "none",
    channels_last: bool = False,
    lora_text_encoders: TextEncoders = "refuse",
    **options: Value,
) -> Generator:
    """Load a model to draw from. The kind follows from its model_index.json.

    `prior`: the first stage of Stable Cascade. The arguments after it are those of `load_backbone`, and plain pipelines do
    not read them. Raises DiffalignError as `load_backbone` does.
    """
    path = str(path)
    index, commit = model_index(path, config, revision, token, local_files_only)
    name = read_index(path, index)["_class_name"]
    if name in BACKBONES:
        backbone = load_backbone(
            path,
            revision=revision,
            variant=variant,
            token=token,
            local_files_only=local_files_only,
            config=config,
            dtype=dtype,
            device=device,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
            quantize=quantize,
            channels_last=channels_last,
            lora_text_encoders=lora_text_encoders,
            **options,
        )
        return BackboneGenerator(backbone)
    if name != "StableCascadeDecoderPipeline":
        raise DiffalignError(
            f"{path}: pipeline class {name} is not supported; supported are {', '.join(BACKBONES)} and "
            "StableCascadeDecoderPipeline"
        )
    source = find_source(path, index, commit, variant, token, local_files_only)
    index, commit = find_index(prior or PRIOR, None, token, local_files_only)
    first = find_source(prior or PRIOR, index, commit, variant, token, local_files_only)
    stages = load_pipeline(cascade_prior, first, dtype, device), load_pipeline(cascade_decoder, source, dtype, device)
    return CascadeGenerator(*stages, source, dtype)
