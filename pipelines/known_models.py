"""Published models whose sizes are known here, so that a dry run needs neither their files nor a network.

`known_models.json` has, by hub id: the pipeline's class; the trunk's config as published; the scheduler; the tokens of a
prompt; the number of weights of the other components, and the bytes of a number in the repository's files; the page of
terms to accept, where the repository is gated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.pipelines.base import Backbone
from diffalign.pipelines.checkpointing import Checkpointing
from diffalign.pipelines.loading import BACKBONES
from diffalign.pipelines.options import Value, read_options
from diffalign.pipelines.source import Source

VAE: dict[str, Any] = {
    "block_out_channels": (32,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""A stand-in of a few weights, of the factor that all these models have."""
TRUNKS = {
    "StableDiffusionPipeline": "UNet2DConditionModel",
    "StableDiffusionXLPipeline": "UNet2DConditionModel",
    "StableDiffusion3Pipeline": "SD3Transformer2DModel",
    "FluxPipeline": "FluxTransformer2DModel",
}


@dataclass(frozen=True)
class KnownModel:
    """A published model. others: component -> its number of weights; bytes: of a number on the hub, by variant ("" plain)."""

    path: str
    pipeline: str
    trunk: dict[str, Any]
    scheduler: dict[str, Any]
    tokens: int
    others: dict[str, int]
    bytes: dict[str, int]
    terms: str | None

    def download_bytes(self, variant: str | None, weights: int, left_out: tuple[str, ...] = ()) -> int:
        """Return the size of what is downloaded, about; `weights`: of the trunk. left_out: components that are not."""
        each = self.bytes.get(variant or "", self.bytes[""])
        return each * (weights + sum(count for name, count in self.others.items() if name not in left_out))


@dataclass(frozen=True)
class Tokens:
    """In a tokenizer's place: how long a prompt may be."""

    model_max_length: int


@cache
def known_models() -> dict[str, KnownModel]:
    """Return the known models by hub id."""
    text = resources.files("diffalign.pipelines").joinpath("known_models.json").read_text(encoding="utf-8")
    return {path: KnownModel(path, **stated) for path, stated in json.loads(text).items()}


def known_backbone(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    gradient_checkpointing: Checkpointing = False,
    quantize: str = "none",
    channels_last: bool = False,
    **options: Value,
) -> Backbone:
    """Build a known model without weights: its trunk lies on the meta device, and it has no text encoders.

    It has facts, tunes and predicts shapes. Raises DiffalignError as `load_backbone` does for options, and for 4-bit weights,
    which need the weights themselves.
    """
    import diffusers

    model = known_models()[path]
    kind = BACKBONES[model.pipeline]
    if quantize == "nf4":
        raise DiffalignError(f"model.quantize=nf4: the memory of {path} is not predicted without its weights")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            trunk = getattr(diffusers, TRUNKS[model.pipeline])(**model.trunk)
    finally:
        torch.set_default_dtype(before)
    settings = dict(model.scheduler)
    scheduler = getattr(diffusers, settings.pop("class"))(**settings)
    channels = trunk.config.out_channels or trunk.config.in_channels // 4  # FLUX packs 2 x 2 of a latent
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(**VAE, latent_channels=channels)
    tokenizer = Tokens(77)
    parts: dict[str, Any] = {"vae": vae, "scheduler": scheduler, "text_encoder": None, "tokenizer": tokenizer}
    if model.pipeline == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None}
    else:
        parts |= {"text_encoder_2": None, "tokenizer_2": Tokens(model.tokens)}
    if model.pipeline == "StableDiffusion3Pipeline":
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
    unet = TRUNKS[model.pipeline].startswith("UNet")
    pipeline = kind.pipeline_class()(**parts, **{"unet" if unet else "transformer": trunk}, **kind.loading_options)
    return kind(
        pipeline,
        Source(path, Path(path), None),
        dtype=dtype,
        device="meta",
        attention=attention,
        gradient_checkpointing=gradient_checkpointing,
        quantize=quantize,
        channels_last=channels_last,
        options=read_options(kind.family, options, path),
    )


def empty_conditioning(backbone: Backbone) -> dict[str, Tensor]:
    """Return tensors in the shapes of `encode_prompts` of one prompt, on the meta device, for a known backbone."""
    config: Any = backbone.trunk.config
    tokens = backbone.prompt_tokens()
    if "cross_attention_dim" in config:
        found = {"prompt_embeds": torch.empty(1, tokens, config.cross_attention_dim, device="meta")}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            found["pooled_prompt_embeds"] = torch.empty(1, pooled, device="meta")
        return found
    return {
        "prompt_embeds": torch.empty(1, tokens, config.joint_attention_dim, device="meta"),
        "pooled_prompt_embeds": torch.empty(1, config.pooled_projection_dim, device="meta"),
    }
