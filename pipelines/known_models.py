"""Published models whose sizes are known here, so that a dry run needs neither their files nor a network.

`known_models.json` has, by hub id: the pipeline's class; the configs of trunk and VAE as published (no VAE: one with the
factor 8 stands in); the scheduler; the tokens of a prompt; the number of weights of the other components, and the bytes of
a number in the repository's files; the page of terms to accept, where the repository is gated.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.pipelines.base import Backbone
from diffalign.pipelines.checkpointing import Checkpointing
from diffalign.pipelines.components import component_types
from diffalign.pipelines.loading import BACKBONES
from diffalign.pipelines.options import Value, read_options
from diffalign.pipelines.source import Source

VAE: dict[str, Any] = {
    "block_out_channels": (32,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""A stand-in of a few weights, of the factor that most models have."""
CLIP_TOKENS = 77


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
    vae: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the pipeline's class, as model_index.json has them."""

    def download_bytes(self, variant: str | None, weights: int, left_out: tuple[str, ...] = ()) -> int:
        """Return the size of what is downloaded, about; `weights`: of the trunk. left_out: components that are not."""
        each = self.bytes.get(variant or "", self.bytes[""])
        return each * (weights + sum(count for name, count in self.others.items() if name not in left_out))


@dataclass(frozen=True)
class Tokens:
    """In a tokenizer's place: how long a prompt may be."""

    model_max_length: int

    def encode(self, text: str) -> list[int]:
        """Return one token."""
        return [0]


@dataclass(frozen=True)
class Processor:
    """In a processor's place: a template of no tokens."""

    tokenizer: Tokens

    def apply_chat_template(self, messages: object, **options: object) -> list[list[int]]:
        """Return the tokens of one conversation."""
        return [[]]


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

    It has facts, tunes and predicts shapes. Raises DiffalignError as `load_backbone` does for options.
    """
    import diffusers

    model = known_models()[path]
    kind = BACKBONES[model.pipeline]
    types = component_types(kind.pipeline_class(), kind.component_classes())
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            trunk: Any = types[kind.trunk_name](**model.trunk)
    finally:
        torch.set_default_dtype(before)
    settings = dict(model.scheduler)
    scheduler = getattr(diffusers, settings.pop("class"))(**settings)
    with torch.device("meta"):
        vae = types["vae"](**(model.vae or {**VAE, "latent_channels": _latent_channels(trunk)}))
    ready = {kind.trunk_name: trunk, "vae": vae, "scheduler": scheduler}
    parts: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind.pipeline_class().__init__).parameters.items():
        if name != "self" and parameter.default is inspect.Parameter.empty:
            clip = "CLIP" in getattr(types[name], "__name__", "")
            tokens = Tokens(CLIP_TOKENS if clip else model.tokens)
            stand_ins = {"processor": Processor(tokens)} | ({name: tokens} if name.startswith("tokenizer") else {})
            parts[name] = ready.get(name, stand_ins.get(name))
    pipeline = kind.pipeline_class()(**parts, **kind.loading_options, **model.arguments)
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


def _latent_channels(trunk: Any) -> int:
    config = trunk.config
    # FLUX packs 2 x 2 of a latent; Z-Image states one number for both sides.
    return int(config.get("out_channels", config.in_channels) or config.in_channels // 4)


def empty_conditioning(backbone: Backbone) -> dict[str, Tensor]:
    """Return tensors in the shapes of `encode_prompts` of one prompt, on the meta device, for a known backbone."""
    shapes = backbone.conditioning_shapes()
    return {name: torch.empty(1, *shape, device="meta") for name, shape in shapes.items()}
