"""Load a diffusers pipeline that has no backbone here: Stable Cascade, which is only drawn from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffalign.pipelines.components import check_files, load_components
from diffalign.pipelines.hub import INDEX, hub_errors
from diffalign.pipelines.loading import read_index
from diffalign.pipelines.prompt_length import hide_truncation_warnings
from diffalign.pipelines.source import Source
from diffalign.pretrained import foreign, load_part

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
    import diffusers.utils.logging  # noqa: F401 - before `foreign`, which quiets what is imported

    with foreign(f"{source.path} cannot be loaded"):
        pipeline = build(source, dtype)
    pipeline.set_progress_bar_config(disable=True)
    hide_truncation_warnings()
    return pipeline.to(device)


def cascade_prior(source: Source, dtype: torch.dtype) -> DiffusionPipeline:
    """Load the first stage of Stable Cascade."""
    from diffusers import StableCascadePriorPipeline

    networks: Any = _networks(source, StableCascadePriorPipeline, dtype)
    return StableCascadePriorPipeline(**networks, **_cascade_text(source))


def cascade_decoder(source: Source, dtype: torch.dtype) -> DiffusionPipeline:
    """Load the second stage of Stable Cascade, part by part: its model_index.json names a module that diffusers has moved."""
    from diffusers import StableCascadeDecoderPipeline

    networks: Any = _networks(source, StableCascadeDecoderPipeline, dtype)
    return StableCascadeDecoderPipeline(**networks, **_cascade_text(source))


def _networks(source: Source, kind: type[DiffusionPipeline], dtype: torch.dtype) -> dict[str, nn.Module]:
    return load_components(source, read_index(source.path, source.folder / INDEX), kind, dtype, vae_dtype=dtype)


def _cascade_text(source: Source) -> dict[str, Any]:
    from diffusers import DDPMWuerstchenScheduler
    from transformers import CLIPTokenizer

    return {
        "tokenizer": load_part(CLIPTokenizer, source.folder / "tokenizer", source.path),
        "scheduler": DDPMWuerstchenScheduler.from_pretrained(source.folder, subfolder="scheduler"),
    }
