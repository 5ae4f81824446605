"""Trained weights in the layouts that others read: diffusers' LoRA, kohya's, a pipeline with the LoRA merged, as one file."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.errors import DiffalignError, brief
from diffalign.files import replacing
from diffalign.files.parse import parse_json
from diffalign.files.published import drop_local_paths
from diffalign.pipelines.adapters import POLICY, has_adapter
from diffalign.pipelines.kohya import KOHYA_FILE, to_kohya
from diffalign.pipelines.lora_file import LORA_FILE, lora_file
from diffalign.pipelines.original_names import Config
from diffalign.pipelines.save_lora import LORA_METADATA, as_trained, write_lora, write_tensors
from diffalign.pipelines.save_single_file import SINGLE_FILE, whole_state
from diffalign.pretrained import quiet_progress

if TYPE_CHECKING:
    from diffalign.pipelines.base import Backbone
    from diffalign.pipelines.family import Family


PEFT_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Lora:
    """A LoRA as it was trained: tensors and peft's config, both without the trunk's name."""

    state: dict[str, Tensor]
    config: dict[str, Any]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return float(self.config["lora_alpha"] / self.config["r"])


def read_lora(folder: Path) -> Lora:
    """Read a LoRA that `save_weights` wrote.

    Raises DiffalignError where there is none, where rank and alpha are not in its metadata, or where layers differ in them.
    """
    from safetensors import SafetensorError, safe_open

    path = lora_file(folder)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        config = {key.split(".", 1)[1]: value for key, value in parse_json(metadata[LORA_METADATA]).items()}
        state, alpha = as_trained(state, metadata)
    except (OSError, ValueError, SafetensorError) as error:
        raise DiffalignError(f"{path} cannot be read as a LoRA: {brief(error)}") from error
    except KeyError as error:
        raise DiffalignError(
            f"{path} does not say its rank and alpha; only a LoRA that diffalign saved is exported"
        ) from error
    if config.get("rank_pattern") or config.get("alpha_pattern") or config.get("use_rslora"):
        raise DiffalignError(
            f"{path}: its layers differ in rank or alpha; only a LoRA that diffalign trained is exported"
        )
    config = {"rank_pattern": {}, "use_rslora": False, **config}
    if alpha is not None:
        config["lora_alpha"] = alpha
    return Lora({key.split(".", 1)[1]: value for key, value in state.items()}, config)


def export_trunk(weights: Path, trunk_name: str, out: Path) -> None:
    """Copy the folder of a trunk whose weights were all trained."""
    shutil.copytree(weights / trunk_name, out / trunk_name, dirs_exist_ok=True)
    drop_local_paths(out / trunk_name)


def export_diffusers(weights: Path, trunk_name: str, out: Path) -> None:
    """Write the LoRA for `load_lora_weights`, its strength in the weights."""
    lora = read_lora(weights)
    scales = {key.rpartition(".lora_B.")[0]: lora.scale for key in lora.state if ".lora_B." in key}
    write_lora(out / LORA_FILE, lora.state, lora.config, scales, trunk_name)


def export_peft(weights: Path, out: Path) -> None:
    """Write the LoRA as a folder of peft's, for `PeftModel.from_pretrained`: for trunks whose pipeline loads no LoRA."""
    from peft import LoraConfig

    lora = read_lora(weights)
    config = LoraConfig(
        r=int(lora.config["r"]), lora_alpha=lora.config["lora_alpha"], target_modules=lora.config["target_modules"]
    )
    config.inference_mode = True
    config.save_pretrained(str(out))
    state = {f"base_model.model.{key}": value for key, value in lora.state.items()}
    write_tensors(out / PEFT_FILE, state, {"format": "pt"})


def export_kohya(weights: Path, family: type[Family], config: Config, out: Path) -> None:
    """Write one file for programs that read kohya's layout. config: the trunk's, which decides the names of its blocks."""
    layout = family.kohya
    if layout is None:
        raise DiffalignError(
            f"--format kohya: that layout is not known for {family.family}; use --format diffusers or merged"
        )
    lora = read_lora(weights)
    metadata = {
        "format": "pt",
        "ss_network_module": layout.network,
        "ss_network_dim": str(lora.config["r"]),
        "ss_network_alpha": f"{lora.config['lora_alpha']:g}",
        "ss_base_model_version": layout.base,
    }
    write_tensors(out / KOHYA_FILE, to_kohya(lora.state, lora.scale, layout.place, config), metadata)


def export_merged(backbone: Backbone, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the whole pipeline with the backbone's policy as its trunk, as a folder for `from_pretrained`.

    Load the backbone in float32: a LoRA added to half-precision weights is rounded to their last bits.
    """
    _fuse(backbone, dtype)
    with quiet_progress():
        backbone.pipeline.save_pretrained(out, safe_serialization=True)
    drop_local_paths(out)


def export_single_file(backbone: Backbone, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the same as one file, in the layout of those who published the model. Raises DiffalignError where there is none."""
    from safetensors.torch import save_file

    _fuse(backbone, dtype)
    state = {key: value.contiguous() for key, value in single_file(backbone).items()}
    # Not `write_tensors`, which holds the file's bytes in memory; one entry of metadata has one order.
    with replacing(out / SINGLE_FILE) as part:
        save_file(state, part, metadata={"format": "pt"})


def single_file(backbone: Backbone) -> dict[str, Tensor]:
    """Return all tensors of a backbone's pipeline by their names in one file. Raises DiffalignError where there is none."""
    layout = backbone.single_file
    if layout is None:
        raise DiffalignError(
            f"--format single-file: that layout is not known for {backbone.family}; use --format merged"
        )
    pipeline, trunk = backbone.pipeline, backbone.pipeline_trunk
    config: Any = trunk.config
    found = whole_state(layout, trunk, dict(config), pipeline.components)
    if layout.trunk and backbone.process.prediction_type == "v_prediction":  # how ComfyUI knows SDXL's kind
        found["v_pred"] = torch.tensor([])
        if pipeline.scheduler.config.get("rescale_betas_zero_snr"):
            found["ztsnr"] = torch.tensor([])
    return found


def _fuse(backbone: Backbone, dtype: torch.dtype) -> None:
    """Add the policy's LoRA to the trunk's weights, if it has one, then round all components to `dtype`."""
    pipeline = backbone.pipeline
    if has_adapter(backbone.trunk, POLICY):
        trunk: Any = backbone.trunk
        trunk.fuse_lora(adapter_names=[POLICY])
        trunk.unload_lora()
    if dtype != torch.float32:
        pipeline.to(dtype=dtype)
