"""Trunks with the blocks of the published models, but narrow: what decides the names in files of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.pipelines.adapters import POLICY, adapter_parameters, add_adapter, save_adapter
from diffalign.pipelines.export import export_diffusers, export_kohya
from diffalign.pipelines.kohya import KOHYA_FILE
from diffalign.pipelines.loading import BACKBONES
from diffalign.pipelines.lora_file import LORA_FILE
from helpers.lora_readers import Model


def sd15() -> Any:
    from diffusers import UNet2DConditionModel

    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=2, block_out_channels=(8, 8, 16, 16), norm_num_groups=4, attention_head_dim=2,
        down_block_types=down, up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, cross_attention_dim=12,
    )  # fmt: skip


def sdxl() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, layers_per_block=2, block_out_channels=(8, 16, 24), norm_num_groups=4, attention_head_dim=(1, 2, 3),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=12, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=40,
    )  # fmt: skip


def _mmdit(depth: int, **options: Any) -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=depth, num_attention_heads=2,
        attention_head_dim=8, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=20,
        pos_embed_max_size=8, **options,
    )  # fmt: skip


def sd3() -> Any:
    return _mmdit(24)


def sd35() -> Any:
    """SD3.5 Medium: normalised queries and keys, a second attention in the first 13 blocks."""
    return _mmdit(24, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)))


def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=19, num_single_layers=38, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


TRUNKS = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "sd35": sd35, "flux": flux}
PIPELINES = {
    "sd15": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
}


def every_layer(trunk: nn.Module) -> list[str]:
    return [name for name, m in trunk.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def with_adapters(trunk: Any, rank: int, alpha: float, targets: list[str]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Add adapters as after a training; return layer -> (A, B, alpha / rank)."""
    add_adapter(trunk, rank, alpha, targets, seed=0)
    generator = torch.Generator().manual_seed(1)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, parameter in adapter_parameters(trunk, POLICY).items():
        parameter.data = torch.randn(parameter.shape, generator=generator)
        layer, _, rest = name.partition(".lora_")
        layers.setdefault(layer, {})[rest[0]] = parameter.data
    return {layer: (pair["A"], pair["B"], alpha / rank) for layer, pair in layers.items()}


def exported(
    name: str, folder: Path, targets: list[str] | None = None, rank: int = 4, alpha: float = 8.0
) -> tuple[Model, dict[str, Tensor], dict[str, Path]]:
    """Write a LoRA as a run and its exports do: the model, alpha / rank B A of each weight, and the files by format."""
    trunk = TRUNKS[name]()
    family = BACKBONES[PIPELINES[name]]
    shapes = {key: tuple(value.shape) for key, value in trunk.state_dict().items()}
    model = Model("sd3" if name == "sd35" else name, dict(trunk.config), shapes)
    layers = with_adapters(trunk, rank, alpha, targets or list(family.lora_targets))
    weights, diffusers, kohya = (folder / form for form in ("weights", "diffusers", "kohya"))
    for made in (weights, diffusers, kohya):
        made.mkdir()
    save_adapter(trunk, family.trunk_name, POLICY, weights)
    export_diffusers(weights, family.trunk_name, diffusers)
    export_kohya(weights, family, dict(trunk.config), kohya)
    files = {"weights": weights / LORA_FILE, "diffusers": diffusers / LORA_FILE, "kohya": kohya / KOHYA_FILE}
    return model, model.true_changes(layers), files
