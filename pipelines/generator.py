"""Drawing images from any model of this package, and from a few that it only draws from.

A `Generator` has one method that matters, `draw`. Families with a backbone are drawn from through it, so that a LoRA or the
weights of a run apply; PixArt-Sigma and Stable Cascade are plain diffusers pipelines.
"""

from __future__ import annotations

import gc
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.pipelines.adapters import brief
from diffalign.pipelines.base import Backbone
from diffalign.pipelines.hub import download, find_index, hub_errors
from diffalign.pipelines.loading import BACKBONES, Source, check_files, load_backbone, read_index
from diffalign.pipelines.tuning import quiet_progress

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


class Generator(ABC):
    """A loaded model that draws images. Image i depends on prompt i and seed i, and in its last bits on the batch."""

    pipeline: Any
    source: Source
    dtype: torch.dtype

    @abstractmethod
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance_scale: float,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        options: dict[str, Any] | None = None,
        latents: bool = False,
    ) -> list[tuple[Image.Image, np.ndarray | None]]:
        """One image per prompt and seed (below 2^32), with its latent [C, h, w] float32 if `latents`.

        `options`: further arguments of a plain pipeline. Raises DiffalignError where the model has no such thing.
        """

    @abstractmethod
    def load_weights(self, folder: Path) -> None:
        """A LoRA in diffusers' layout; with a backbone, also a run's weights."""

    def facts(self) -> dict[str, str | None]:
        """What decides the images besides the arguments of `draw`."""
        return {
            "model": self.source.path,
            "revision": self.source.revision,
            "fingerprint": self.source.fingerprint(str(self.dtype)),
            "pipeline": type(self.pipeline).__name__,
            "scheduler": type(self.pipeline.scheduler).__name__,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

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

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance_scale: float,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        options: dict[str, Any] | None = None,
        latents: bool = False,
    ) -> list[tuple[Image.Image, np.ndarray | None]]:
        if options:
            raise DiffalignError(f"{self.source.path}: options are for pipelines without a backbone; leave them out")
        found = self.backbone.sample(
            prompts,
            seeds,
            steps=steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            output_type="latent" if latents else "pil",
        )
        if not latents:
            return [(image, None) for image in found]
        images = self.pipeline.image_processor.postprocess(
            self.backbone.decode_latents(found).detach(), output_type="pil", do_denormalize=[False] * len(found)
        )
        return list(zip(images, found.float().cpu().numpy(), strict=True))

    def facts(self) -> dict[str, str | None]:
        # By this, training knows whether stored latents are its own VAE's.
        return super().facts() | {"vae": self.backbone.vae_fingerprint()}

    def load_weights(self, folder: Path) -> None:
        self.backbone.load_weights(folder)

    def close(self) -> None:
        del self.backbone
        super().close()


class PlainGenerator(Generator):
    """A diffusers pipeline as it is: `pipeline(prompt=..., generator=[one a image])`."""

    def __init__(self, pipeline: Any, source: Source, dtype: torch.dtype) -> None:
        self.pipeline, self.source, self.dtype = pipeline, source, dtype

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance_scale: float,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        options: dict[str, Any] | None = None,
        latents: bool = False,
    ) -> list[tuple[Image.Image, np.ndarray | None]]:
        if latents:
            raise DiffalignError(
                f"{self.source.path} has no backbone here, so its latents are of no use; latents=false"
            )
        # Pipelines may swallow arguments that they do not know.
        unknown = sorted(set(options or {}) - self.options())
        if unknown:
            raise DiffalignError(
                f"{self.source.path}: options.{unknown[0]} is unknown; there are {', '.join(sorted(self.options()))}"
            )
        arguments: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale, **(options or {})}
        if negative_prompt is not None:
            arguments["negative_prompt"] = [negative_prompt] * len(prompts)
        if height is not None:
            arguments |= {"height": height, "width": width}
        with torch.no_grad():
            return [(image, None) for image in self._call(list(prompts), _generators(seeds), arguments)]

    def options(self) -> set[str]:
        """Arguments that `options` may hold."""
        return set(inspect.signature(type(self.pipeline).__call__).parameters) - OURS

    def _call(self, prompts: list[str], generators: list[torch.Generator], arguments: dict[str, Any]) -> Any:
        return self.pipeline(prompt=prompts, generator=generators, output_type="pil", **arguments).images

    def load_weights(self, folder: Path) -> None:
        try:
            self.pipeline.load_lora_weights(str(folder))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise DiffalignError(f"weights {folder}: no LoRA for {self.source.path}: {brief(error)}") from error


class PixArtGenerator(PlainGenerator):
    """PixArt-Sigma. Prompts go in as they are, and images keep the size that was asked for."""

    def _call(self, prompts: list[str], generators: list[torch.Generator], arguments: dict[str, Any]) -> Any:
        plain = {"clean_caption": False, "use_resolution_binning": False, **arguments}
        return super()._call(prompts, generators, plain)


class CascadeGenerator(PlainGenerator):
    """Stable Cascade: a prior, with `steps` and `guidance_scale`, then a decoder (`decoder_steps`, `decoder_guidance`)."""

    def __init__(self, prior: Any, decoder: Any, source: Source, dtype: torch.dtype) -> None:
        super().__init__(decoder, source, dtype)
        self.prior = prior

    def _call(self, prompts: list[str], generators: list[torch.Generator], arguments: dict[str, Any]) -> Any:
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
        return self.pipeline(
            image_embeddings=embeddings, prompt=prompts, generator=generators, output_type="pil", **second
        ).images

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
    prior: str | None = None,
    **options: Any,
) -> Generator:
    """Load a model to draw from. The kind follows from its model_index.json; `options` are those of `load_backbone`.

    `prior`: the first stage of Stable Cascade. Raises DiffalignError as `load_backbone` does.
    """
    path = str(path)
    index, commit = find_index(path, revision, token, local_files_only)
    name = read_index(path, index)["_class_name"]
    hub: dict[str, Any] = {"variant": variant, "token": token, "local_files_only": local_files_only}
    if name in BACKBONES:
        return BackboneGenerator(load_backbone(path, revision=revision, dtype=dtype, device=device, **hub, **options))
    if name not in ("PixArtSigmaPipeline", "StableCascadeDecoderPipeline"):
        raise DiffalignError(
            f"{path}: pipeline class {name} is not supported; supported are {', '.join(BACKBONES)}, "
            "PixArtSigmaPipeline and StableCascadeDecoderPipeline"
        )
    source = _source(path, index, commit, variant, token, local_files_only)
    if name == "PixArtSigmaPipeline":
        return PixArtGenerator(_load(_pixart, source, dtype, device), source, dtype)
    index, commit = find_index(prior or PRIOR, None, token, local_files_only)
    first = _source(prior or PRIOR, index, commit, variant, token, local_files_only)
    stages = _load(_cascade_prior, first, dtype, device), _load(_cascade_decoder, source, dtype, device)
    return CascadeGenerator(*stages, source, dtype)


def _source(path: str, index: Path, commit: str | None, variant: str | None, token: str | None, local: bool) -> Source:
    components = read_index(path, index)
    # Stable Cascade's prior can start from a picture; here it starts from text.
    absent: dict[str, None] = {name: None for name in ("image_encoder", "feature_extractor") if name in components}
    folder = index.parent
    if commit is not None and not local:
        if components["_class_name"] == "PixArtSigmaPipeline":
            folder = download(path, commit, variant, token, absent)
        else:
            folder = _snapshot(path, commit, variant, token)
    source = Source(path, folder, commit, variant, absent)
    check_files(source, components)
    return source


def _snapshot(path: str, commit: str, variant: str | None, token: str | None) -> Path:
    """The folders of a pipeline whose model_index.json diffusers itself no longer resolves."""
    import huggingface_hub

    weights = (
        [f"*/*.{variant}.safetensors"] if variant else ["*/model.safetensors", "*/diffusion_pytorch_model.safetensors"]
    )
    with hub_errors(path, commit, "its weights"):
        return Path(
            huggingface_hub.snapshot_download(
                path, revision=commit, token=token, allow_patterns=["*.json", "*/*.json", "*/*.txt", *weights]
            )
        )


def _load(build: Callable[[Source, torch.dtype], Any], source: Source, dtype: torch.dtype, device: Any) -> Any:
    from safetensors import SafetensorError

    try:
        with quiet_progress():
            pipeline = build(source, dtype)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise DiffalignError(f"{source.path} cannot be loaded: {brief(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _pixart(source: Source, dtype: torch.dtype) -> Any:
    from diffusers import PixArtSigmaPipeline

    return PixArtSigmaPipeline.from_pretrained(
        source.folder, dtype=dtype, variant=source.variant, use_safetensors=True, local_files_only=True, **source.absent
    )


def _cascade_prior(source: Source, dtype: torch.dtype) -> Any:
    from diffusers import StableCascadePriorPipeline
    from diffusers.models import StableCascadeUNet

    prior = StableCascadeUNet.from_pretrained(source.folder, subfolder="prior", **_weights(source, dtype))
    return StableCascadePriorPipeline(prior=prior, **_cascade_text(source, dtype))


def _cascade_decoder(source: Source, dtype: torch.dtype) -> Any:
    """Built from its parts: model_index.json names a part by a module that diffusers has moved since."""
    from diffusers import StableCascadeDecoderPipeline
    from diffusers.models import StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

    options = _weights(source, dtype)
    decoder = StableCascadeUNet.from_pretrained(source.folder, subfolder="decoder", **options)
    vqgan = PaellaVQModel.from_pretrained(source.folder, subfolder="vqgan", **options)
    return StableCascadeDecoderPipeline(decoder=decoder, vqgan=vqgan, **_cascade_text(source, dtype))


def _cascade_text(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    from diffusers import DDPMWuerstchenScheduler
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    return {
        "tokenizer": CLIPTokenizer.from_pretrained(source.folder / "tokenizer"),
        "text_encoder": CLIPTextModelWithProjection.from_pretrained(
            source.folder, subfolder="text_encoder", **_weights(source, dtype)
        ),
        "scheduler": DDPMWuerstchenScheduler.from_pretrained(source.folder, subfolder="scheduler"),
    }


def _weights(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    return {"dtype": dtype, "variant": source.variant, "use_safetensors": True, "local_files_only": True}


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    outside = [s for s in seeds if not 0 <= s < 2**32]
    if outside:
        raise DiffalignError(f"seed {outside[0]} is outside 0..2**32-1; larger ones would repeat silently")
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]
