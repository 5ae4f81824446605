"""The models that speed is measured on: SDXL, SD3.5-Medium and FLUX.1-dev from their configs alone, randomly initialised.

No weights are needed for a speed. `sdxl`, `sd35` and `flux` have the published sizes; the `small-` ones are what a CPU can step
through, the `deep-` ones have the depth alone and the `shallow-` ones the width alone. Text encoders are left out, since
training reads embeddings; `common_dpo_script.py` builds its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from diffalign.pipelines.base import Backbone
from diffalign.pipelines.flux import Flux
from diffalign.pipelines.source import Source
from diffalign.pipelines.stable_diffusion import StableDiffusionXL
from diffalign.pipelines.stable_diffusion_3 import StableDiffusion3
from diffalign.testbed.tokenizers import clip_tokenizer

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# A fifth of the width and a third of the deepest blocks' layers.
SMALL_SDXL = SDXL | {
    "sample_size": 32,
    "block_out_channels": (64, 128, 256),
    "transformer_layers_per_block": (1, 1, 3),
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 256,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 6 * 32 + 160,
}
# The published depth and next to no width: what is left is Python's and torch's own time.
DEEP_SDXL = SDXL | {
    "sample_size": 8,
    "block_out_channels": (32, 32, 32),
    "attention_head_dim": (1, 1, 1),
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}
# The published width, and one layer wherever there are several alike: what a test has time for.
SHALLOW_SDXL = SDXL | {"transformer_layers_per_block": (1, 1, 1)}
SD35: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
SMALL_SD35 = SD35 | {
    "sample_size": 32,
    "num_layers": 4,
    "num_attention_heads": 4,
    "joint_attention_dim": 256,
    "caption_projection_dim": 256,
    "pooled_projection_dim": 128,
    "pos_embed_max_size": 64,
    "dual_attention_layers": (0, 1),
}
DEEP_SD35 = SD35 | {
    "sample_size": 8,
    "attention_head_dim": 32,
    "num_attention_heads": 1,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 16,
}
SHALLOW_SD35 = SD35 | {"num_layers": 3, "dual_attention_layers": (0,)}
FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
SMALL_FLUX = FLUX | {
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 8,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 128,
    "axes_dims_rope": (8, 12, 12),
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.13025,
}
BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Model:
    """A family, the config of its trunk, the tokens of a prompt, the side of its images, and which pipeline it is."""

    family: str
    config: dict[str, Any]
    tokens: int
    side: int


MODELS = {
    "sdxl": Model("sdxl", SDXL, 77, 1024),
    "sd35": Model("sd3", SD35, 77 + 256, 1024),
    "flux": Model("flux", FLUX, 512, 1024),
    "small-sdxl": Model("sdxl", SMALL_SDXL, 77, 256),
    "small-sd35": Model("sd3", SMALL_SD35, 77 + 16, 256),
    "small-flux": Model("flux", SMALL_FLUX, 64, 256),
    "deep-sdxl": Model("sdxl", DEEP_SDXL, 8, 64),
    "deep-sd35": Model("sd3", DEEP_SD35, 8, 64),
    "shallow-sdxl": Model("sdxl", SHALLOW_SDXL, 77, 1024),
    "shallow-sd35": Model("sd3", SHALLOW_SD35, 77 + 256, 1024),
}
TRUNKS = {"sdxl": UNet2DConditionModel, "sd3": SD3Transformer2DModel, "flux": FluxTransformer2DModel}


def trunk(name: str, device: str, dtype: torch.dtype) -> Any:
    """The UNet or transformer, initialised where it will lie, in the type that it will have."""
    model = MODELS[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return TRUNKS[model.family](**model.config)
    finally:
        torch.set_default_dtype(before)


def backbone(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> Backbone:
    """A backbone without text encoders, whose VAE is a stand-in of a few weights; `options` as of `load_backbone`."""
    model = MODELS[name]
    channels = 4 if model.family == "sdxl" else 16
    with torch.device(device):
        vae = AutoencoderKL(**VAE | {"block_out_channels": (32,) * 4, "latent_channels": channels})
    source = Source(name, Path(name), None)  # no such folder: there are no files to tell it by
    common: dict[str, Any] = {
        "vae": vae,
        "text_encoder": None,
        "tokenizer": clip_tokenizer(),  # its length is part of the model's fingerprint
        "text_encoder_2": None,
        "tokenizer_2": None,
    }
    if model.family == "sdxl":
        pipeline: Any = StableDiffusionXLPipeline(
            unet=trunk(name, device, dtype), scheduler=EulerDiscreteScheduler(**BETAS), add_watermarker=False, **common
        )
        return StableDiffusionXL(pipeline, source, dtype=dtype, device=device, **options)
    network = trunk(name, device, dtype)
    if model.family == "sd3":
        common |= {"text_encoder_3": None, "tokenizer_3": None, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
        pipeline = StableDiffusion3Pipeline(transformer=network, **common)
        return StableDiffusion3(pipeline, source, dtype=dtype, device=device, **options)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    pipeline = FluxPipeline(transformer=network, scheduler=scheduler, **common)
    return Flux(pipeline, source, dtype=dtype, device=device, **options)


def embeddings(name: str, prompts: int = 1) -> dict[str, Tensor]:
    """Random numbers in the shapes of `encode_prompts`."""
    model, generator = MODELS[name], torch.Generator().manual_seed(1)
    config = model.config
    if model.family == "sdxl":
        width = config["cross_attention_dim"]
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    else:
        width, pooled = config["joint_attention_dim"], config["pooled_projection_dim"]
    return {
        "prompt_embeds": torch.randn(prompts, model.tokens, width, generator=generator),
        "pooled_prompt_embeds": torch.randn(prompts, pooled, generator=generator),
    }


def latent_shape(name: str, side: int) -> tuple[int, int, int]:
    """(C, h, w) for square images of this many pixels."""
    return (4 if MODELS[name].family == "sdxl" else 16, side // 8, side // 8)
