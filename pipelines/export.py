"""Trained weights in the layouts that others read: diffusers' LoRA, kohya's LoRA, a whole pipeline with the LoRA merged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.errors import DiffalignError, brief
from diffalign.files.parse import parse_json
from diffalign.pipelines.adapters import POLICY, has_adapter
from diffalign.pipelines.lora_file import LORA_FILE, lora_file
from diffalign.pretrained import quiet_progress

if TYPE_CHECKING:
    from diffalign.pipelines.base import Backbone
    from diffalign.pipelines.family import Family

DIFFUSERS_METADATA = "lora_adapter_metadata"


def read_lora(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a LoRA that `save_weights` wrote: its tensors, and its config without the trunk's prefix (r, lora_alpha, ...).

    Raises DiffalignError where there is none, or where rank and alpha are not in its metadata.
    """
    from safetensors import SafetensorError, safe_open

    path = lora_file(folder)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        config = parse_json(metadata[DIFFUSERS_METADATA])
    except (OSError, ValueError, SafetensorError) as error:
        raise DiffalignError(f"{path} cannot be read as a LoRA: {brief(error)}") from error
    except KeyError as error:
        raise DiffalignError(
            f"{path} does not say its rank and alpha; only a LoRA that diffalign saved is exported"
        ) from error
    return state, {key.split(".", 1)[1]: value for key, value in config.items()}


def export_diffusers(weights: Path, trunk_name: str, out: Path) -> None:
    """Write the LoRA for `load_lora_weights`, rank and alpha also under plain names in the metadata; or the trunk's folder."""
    if (weights / trunk_name).is_dir():
        shutil.copytree(weights / trunk_name, out / trunk_name, dirs_exist_ok=True)
        return
    from safetensors.torch import save_file

    state, config = read_lora(weights)
    metadata = {
        "format": "pt",
        "rank": str(config["r"]),
        "alpha": f"{config['lora_alpha']:g}",
        DIFFUSERS_METADATA: json.dumps({f"{trunk_name}.{k}": v for k, v in config.items()}),
    }
    save_file(state, out / LORA_FILE, metadata=metadata)


ATTENTION = re.compile(r"unet\.(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.attentions\.(\d+)\.(.+)")


def sgm_modules(modules: Iterable[str]) -> dict[str, str] | None:
    """Map diffusers' names of a UNet's attention layers to those of Stability's code; None if a layer is no attention's.

    There the blocks are numbered through: n resnets, and the attention behind each, are n inputs, a downsampler is one more
    (block 0 is the first convolution), and an up block has n + 1 outputs. The attention stands second in its block.
    """
    found = {name: ATTENTION.fullmatch(name) for name in modules}
    parts = {name: match.groups() for name, match in found.items() if match}
    if len(parts) < len(found):
        return None
    down = [int(j) + 1 for side, _, j, _ in parts.values() if side == "down_blocks"]
    up = [int(j) for side, _, j, _ in parts.values() if side == "up_blocks"]
    n = max(down + up, default=1)
    names = {}
    for name, (side, block, j, rest) in parts.items():
        i = int(block or 0) * (n + 1) + int(j)
        place = {"down_blocks": f"input_blocks.{1 + i}", "mid_block": "middle_block", "up_blocks": f"output_blocks.{i}"}
        names[name] = f"unet.{place[side]}.1.{rest}"
    return names


def to_kohya(state: dict[str, Tensor], alpha: float, blocks: str) -> dict[str, Tensor]:
    """Rename `unet.a.b.lora_A.weight` to `lora_unet_a_b.lora_down.weight`, with an alpha beside each pair.

    blocks: whose names of blocks to take, "diffusers" or "sgm" (`Family.kohya_blocks`).
    kohya's trainer names the blocks of SD1.5 as diffusers does and those of SDXL as Stability's code does, and so do the
    files that it writes. An SDXL LoRA that reaches beyond attention keeps diffusers' names: programs take one or the other.
    """
    modules = {key.removesuffix(".weight").rpartition(".")[0] for key in state}
    renamed = (sgm_modules(modules) if blocks == "sgm" else None) or {}
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        module, _, kind = key.removesuffix(".weight").rpartition(".")
        name = renamed.get(module, module).replace("unet.", "lora_unet_", 1).replace(".", "_")
        found[f"{name}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"] = value.contiguous()
        found[f"{name}.alpha"] = torch.tensor(float(alpha))
    return found


def export_kohya(weights: Path, family: type[Family], out: Path) -> None:
    """Write one file for programs that read kohya's layout. Refuse families that it does not fit."""
    from safetensors.torch import save_file

    if family.kohya_base is None:
        raise DiffalignError(
            f"--format kohya: kohya's layout for {family.family} fuses layers that this LoRA adapts apart; use "
            "--format diffusers, which ComfyUI reads too, or --format merged"
        )
    state, config = read_lora(weights)
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config["r"]),
        "ss_network_alpha": f"{config['lora_alpha']:g}",
        "ss_base_model_version": family.kohya_base,
    }
    renamed = to_kohya(state, config["lora_alpha"], family.kohya_blocks)
    save_file(renamed, out / "kohya_lora.safetensors", metadata=metadata)


def export_merged(backbone: Backbone, out: Path) -> None:
    """Write the whole pipeline with the backbone's policy as its trunk, as a folder for `from_pretrained`.

    Load the backbone in float32: a LoRA added to half-precision weights is rounded to their last bits.
    """
    pipeline = backbone.pipeline
    if has_adapter(backbone.trunk, POLICY):
        pipeline.fuse_lora(components=[backbone.trunk_name], adapter_names=[POLICY])
        pipeline.unload_lora_weights()
    with quiet_progress():
        pipeline.save_pretrained(out, safe_serialization=True)
