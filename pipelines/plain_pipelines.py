"""Load diffusers pipelines that have no backbone here: PixArt-Sigma and Stable Cascade, which are only drawn from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffalign.errors import DiffalignError, brief
from diffalign.pipelines.hub import download, hub_errors
from diffalign.pipelines.loading import check_files, read_index
from diffalign.pipelines.source import Source
from diffalign.pretrained import quiet_progress

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def find_source(
    path: str, index: Path, commit: str | None, variant: str | None, token: str | None, local: bool
) -> Source:
    """Find the files of a model, of a hub's repository by downloading them, and check that they are whole.

    index and commit as `find_index` gives them; local: never ask the hub.
    """
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
    """Download the folders of a pipeline whose model_index.json diffusers itself no longer resolves."""
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


def load_pipeline(
    build: Callable[[Source, torch.dtype], DiffusionPipeline],
    source: Source,
    dtype: torch.dtype,
    device: str | torch.device,
) -> DiffusionPipeline:
    """Build a pipeline and put it on the device, without a progress bar. Raises DiffalignError where it cannot be."""
    from safetensors import SafetensorError

    try:
        with quiet_progress():
            pipeline = build(source, dtype)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise DiffalignError(f"{source.path} cannot be loaded: {brief(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def pixart(source: Source, dtype: torch.dtype) -> DiffusionPipeline:
    """Load PixArt-Sigma."""
    from diffusers import PixArtSigmaPipeline

    return PixArtSigmaPipeline.from_pretrained(
        source.folder, dtype=dtype, variant=source.variant, use_safetensors=True, local_files_only=True, **source.absent
    )


def cascade_prior(source: Source, dtype: torch.dtype) -> DiffusionPipeline:
    """Load the first stage of Stable Cascade."""
    from diffusers import StableCascadePriorPipeline
    from diffusers.models import StableCascadeUNet

    prior = StableCascadeUNet.from_pretrained(source.folder, subfolder="prior", **_weights(source, dtype))
    return StableCascadePriorPipeline(prior=prior, **_cascade_text(source, dtype))


def cascade_decoder(source: Source, dtype: torch.dtype) -> DiffusionPipeline:
    """Load the second stage of Stable Cascade, part by part: its model_index.json names a module that diffusers has moved."""
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
