"""A pipeline as one file: diffusers' own reader gets every tensor back, and the names are those of the published code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffalign.errors import DiffalignError
from diffalign.pipelines import load_backbone
from diffalign.pipelines.export import export_single_file, single_file
from diffalign.pipelines.original_names import flux_place, sd3_place, unet_place
from diffalign.pipelines.save_single_file import SINGLE_FILE, trunk_state
from helpers import tiny
from helpers.lora_readers import Model
from helpers.trunks import TRUNKS


def distinct_encoders(folder: Path, family: str) -> Path:
    """diffusers tells the text encoders apart by width, and takes the first one's projection of SD3 for the identity."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    path: Path = getattr(tiny, family)(folder / family)
    backbone = load_backbone(path)
    if family == "sd15":
        return path
    torch.manual_seed(3)
    config = CLIPTextConfig(
        **{**backbone.pipeline.text_encoder_2.config.to_dict(), "hidden_size": 24, "projection_dim": 24}
    )
    backbone.pipeline.text_encoder_2 = CLIPTextModelWithProjection(config)
    if family == "sd3":
        torch.nn.init.eye_(backbone.pipeline.text_encoder.text_projection.weight)
    backbone.pipeline.save_pretrained(path)
    return path


def tuned(path: Path) -> Any:
    backbone = load_backbone(path)
    backbone.add_lora(2, 3.0)
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.trainable().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return backbone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_diffusers_reads_every_tensor(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = distinct_encoders(tmp_path, family)
    before = load_backbone(path).pipeline_trunk.state_dict()
    backbone = tuned(path)
    export_single_file(backbone, tmp_path, dtype)
    assert {value.dtype for value in load_file(tmp_path / SINGLE_FILE).values()} == {dtype}
    kind: Any = type(backbone.pipeline)
    read = kind.from_single_file(
        str(tmp_path / SINGLE_FILE), config=str(path), local_files_only=True, torch_dtype=dtype
    )
    modules = {name: m for name, m in backbone.pipeline.components.items() if isinstance(m, torch.nn.Module)}
    assert len(modules) == {"sd15": 3, "sdxl": 4, "sd3": 5}[family]
    for name, module in modules.items():
        found = read.components[name].state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(found[key], value), (name, key)
    again = load_backbone(tmp_path / SINGLE_FILE, config=str(path), dtype=dtype)  # and as model.path
    for key, value in backbone.pipeline_trunk.state_dict().items():
        assert torch.equal(again.pipeline_trunk.state_dict()[key], value), key
    assert any(
        not torch.equal(before[key].to(dtype), value) for key, value in backbone.pipeline_trunk.state_dict().items()
    )


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "sd35", "flux"])
def test_trunks_with_the_published_blocks(name: str) -> None:
    """Against the places that ComfyUI gives diffusers' weights, read for tests/helpers/lora_readers.py."""
    trunk = TRUNKS[name]()
    state = trunk.state_dict()
    model = Model(
        "sd3" if name == "sd35" else name, dict(trunk.config), {key: tuple(v.shape) for key, v in state.items()}
    )
    place = {"flux": flux_place, "sd15": unet_place, "sdxl": unet_place}.get(name, sd3_place)
    found = trunk_state(state, place, dict(trunk.config))
    assert len(model.targets) > 100 and set(model.shapes) <= set(found)
    for key, target in model.targets.items():
        value = torch.cat(state[key].chunk(2)[::-1]) if target.swap else state[key]
        assert torch.equal(found[target.name][target.start : target.start + len(value)], value), key
    assert sum(v.numel() for v in found.values()) == sum(v.numel() for v in state.values())


def test_flux_is_its_transformer_alone(flux_dir: Path, tmp_path: Path) -> None:
    backbone = tuned(flux_dir)
    export_single_file(backbone, tmp_path)
    with safe_open(tmp_path / SINGLE_FILE, "pt") as file:
        names = set(file.keys())
    assert {"img_in.weight", "double_blocks.0.img_attn.norm.query_norm.scale", "single_blocks.0.linear1.bias"} <= names
    assert not [name for name in names if name.startswith(("vae", "text", "model."))]


def test_v_prediction_is_said_as_comfyui_looks_for_it(tmp_path: Path) -> None:
    plain = single_file(load_backbone(tiny.sdxl(tmp_path / "eps")))
    assert not {"v_pred", "ztsnr"} & set(plain)
    velocity = load_backbone(tiny.sdxl(tmp_path / "v", "v_prediction", scheduler="ddim", rescale_betas_zero_snr=True))
    assert {"v_pred", "ztsnr"} <= set(single_file(velocity))


def test_a_tensor_without_a_name_there_is_refused(sd15_dir: Path, tmp_path: Path) -> None:
    backbone = load_backbone(sd15_dir)
    backbone.pipeline_trunk.register_buffer("extra", torch.ones(1))
    with pytest.raises(
        DiffalignError, match="--format single-file: that layout has no name for extra; use --format merged"
    ):
        export_single_file(backbone, tmp_path)
    assert not (tmp_path / SINGLE_FILE).exists()
