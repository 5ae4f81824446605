"""A LoRA changes every weight in other programs by what was trained: read as they read files, on the published blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign.errors import DiffalignError
from diffalign.pipelines import load_backbone
from diffalign.pipelines.export import export_diffusers, export_kohya
from diffalign.pipelines.kohya import to_kohya
from diffalign.pipelines.loading import BACKBONES
from diffalign.pipelines.lora_file import LORA_FILE
from diffalign.pipelines.momentum import extrapolate_lora
from diffalign.pipelines.original_names import flux_place, unet_place
from helpers.lora_readers import PROGRAMS, Model, largest_difference
from helpers.trunks import PIPELINES, TRUNKS, every_layer, exported

EXACT = 1e-6  # of the largest change; the file holds float32


def reads_whole(program: str, file: Path, model: Model, true: dict[str, torch.Tensor]) -> None:
    found = PROGRAMS[program](file, model)
    assert not found.unread
    assert largest_difference(found.changes, true) < EXACT


@pytest.mark.parametrize(
    ("name", "rank", "alpha"),
    [*((name, 4, 8.0) for name in TRUNKS), *((name, 2, 3.0) for name in TRUNKS), ("sd3", 4, 0.5)],
)
def test_the_strength_is_in_the_tensors(name: str, rank: int, alpha: float, tmp_path: Path) -> None:
    model, true, files = exported(name, tmp_path, rank=rank, alpha=alpha)
    for program in ("ComfyUI", "sd-scripts", *(["A1111"] if name in ("sd15", "sdxl") else [])):
        reads_whole(program, files["kohya"], model, true)
    assert files["weights"].read_bytes() == files["diffusers"].read_bytes()
    if model.family in ("sd3", "flux"):
        reads_whole("ComfyUI", files["weights"], model, true)
    else:  # why a UNet's export holds kohya's file as well
        assert not PROGRAMS["ComfyUI"](files["weights"], model).changes
    found = PROGRAMS["A1111"](files["weights"], model)  # of SD3 the image's side alone, at the right strength
    assert bool(found.changes) == (model.family == "sd3")
    assert not found.changes or largest_difference(found.changes, {k: true[k] for k in found.changes}) < EXACT


@pytest.mark.parametrize(
    "targets",
    [
        ["up_blocks.1.attentions.0"],
        ["down_blocks.2.attentions.0"],
        ["down_blocks.1.attentions.0", "up_blocks.1.attentions.1"],
        ["down_blocks.2.attentions.0", "up_blocks.1.attentions.0"],
        ["mid_block"],
        [
            "down_blocks.2.resnets.1",
            "up_blocks.2.resnets.2",
            "up_blocks.1.upsamplers.0",
            "down_blocks.1.downsamplers.0",
        ],
    ],
    ids=str,
)
def test_some_blocks_of_sdxl_keep_their_places(targets: list[str], tmp_path: Path) -> None:
    """Names follow from the UNet's structure, so they do not depend on which blocks have adapters."""
    inside = [layer for layer in every_layer(TRUNKS["sdxl"]()) if layer.startswith(tuple(f"{t}." for t in targets))]
    model, true, files = exported("sdxl", tmp_path, inside)
    for program in PROGRAMS:
        reads_whole(program, files["kohya"], model, true)


@pytest.mark.parametrize("name", TRUNKS)
def test_every_layer_has_its_place(name: str, tmp_path: Path) -> None:
    """Convolutions, embeddings, fused layers, and modulations whose halves stand in the other order."""
    model, true, files = exported(name, tmp_path, every_layer(TRUNKS[name]()), rank=2, alpha=4.0)
    assert len(true) == sum(len(shape) > 1 for shape in model.shapes.values())
    reads_whole("ComfyUI", files["kohya"], model, true)
    if model.family in ("sd3", "flux"):
        reads_whole("ComfyUI", files["weights"], model, true)
    found = PROGRAMS["sd-scripts"](files["kohya"], model)  # which knows no adapters outside of blocks
    inside = {key: change for key, change in true.items() if key in found.changes}
    assert largest_difference(found.changes, inside) < EXACT
    assert {"_".join(key.split("_")[2:4]) for key in found.unread}.isdisjoint(
        {"joint_blocks", "double_blocks", "single_blocks"}
    )


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("sd3", ["attn.to_v"]),
        ("sd35", ["attn.to_q", "attn2.to_k", "attn2.to_out.0"]),
        ("flux", ["attn.to_k", "attn.add_v_proj"]),
        ("flux", ["proj_mlp", "single_transformer_blocks.3.proj_out", "attn.to_q"]),
    ],
)
def test_some_parts_of_a_fused_layer(name: str, targets: list[str], tmp_path: Path) -> None:
    model, true, files = exported(name, tmp_path, targets, rank=3, alpha=1.0)
    for program in ("ComfyUI", "sd-scripts"):
        reads_whole(program, files["kohya"], model, true)


def test_plain_diffusers_reads_them_with_and_without_metadata(tmp_path: Path) -> None:
    from peft.tuners.lora import LoraLayer

    for name in ("sdxl", "sd3"):
        (tmp_path / name).mkdir()
        _, _, files = exported(name, tmp_path / name)
        state = load_file(files["weights"])
        save_file(state, tmp_path / "bare.safetensors")
        for file in (files["weights"], tmp_path / "bare.safetensors"):
            trunk: Any = TRUNKS[name]()
            prefix = BACKBONES[PIPELINES[name]].trunk_name
            trunk.load_lora_adapter(file.parent, weight_name=file.name, prefix=prefix, use_safetensors=True)
            layers = [m for m in trunk.modules() if isinstance(m, LoraLayer)]
            assert layers and all(layer.scaling == {"default_0": 1.0} for layer in layers)


def test_diffusers_reads_the_kohya_file_of_flux_at_its_width(tmp_path: Path) -> None:
    """Its converter knows FLUX's own width alone: one block of each kind, adapters as wide as the published layers."""
    from diffusers import FluxPipeline

    width, generator = 3072, torch.Generator().manual_seed(0)
    names = {f"transformer_blocks.0.attn.{x}": width for x in ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj")}
    names |= {f"single_transformer_blocks.0.attn.to_{x}": width for x in "qkv"}
    state = {}
    for name, rows in names.items():
        state[f"{name}.lora_A.weight"] = torch.randn(4, width, generator=generator)
        state[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator)
    config = {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 19, "num_single_layers": 38}
    save_file(to_kohya(state, 1.5, flux_place, config), tmp_path / "kohya.safetensors")
    found: dict[str, Any] = FluxPipeline.lora_state_dict(str(tmp_path), weight_name="kohya.safetensors")
    for name in names:
        a, b = (found[f"transformer.{name}.lora_{x}.weight"] for x in "AB")
        true = 1.5 * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        assert float((b @ a - true).abs().max()) < 1e-5 * float(true.abs().max()), name


def test_the_metadata_says_what_was_trained_and_no_more_than_others_need(tmp_path: Path) -> None:
    _, _, files = exported("sdxl", tmp_path, alpha=6.0)
    with safe_open(files["weights"], "pt") as file:
        metadata = file.metadata()
    assert (metadata["trained_rank"], metadata["trained_alpha"]) == ("4", "6.0")
    assert metadata["lora_adapter_metadata"] == (
        '{"unet.init_lora_weights": "gaussian", "unet.lora_alpha": 4, "unet.r": 4, '
        '"unet.target_modules": ["to_k", "to_out.0", "to_q", "to_v"]}'
    )
    with safe_open(files["kohya"], "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "6")
    assert list(metadata) and metadata["ss_base_model_version"] == "sdxl_base_v1-0"


def test_a_file_of_an_earlier_version_is_exported_with_its_strength(tmp_path: Path) -> None:
    """Before, alpha stood in the metadata alone, and the weights were as trained."""
    model, true, files = exported("sd3", tmp_path, alpha=8.0)
    state = load_file(files["weights"])
    old = tmp_path / "old"
    old.mkdir()
    save_file(
        {key: value / 2 if ".lora_B." in key else value for key, value in state.items()}, old / LORA_FILE,
        metadata={"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 8.0}'},
    )  # fmt: skip
    family = BACKBONES[PIPELINES["sd3"]]
    export_diffusers(old, "transformer", tmp_path / "diffusers")
    export_kohya(old, family, dict(TRUNKS["sd3"]().config), tmp_path / "kohya")
    for form in ("diffusers", "kohya"):
        reads_whole("ComfyUI", files[form], model, true)


@pytest.mark.parametrize(
    "wrong",
    [{"trained_rank": "0"}, {"trained_alpha": "nan"}, {"trained_alpha": "much"}, {"trained_alpha": "-1"}],
    ids=str,
)
def test_damaged_metadata_is_refused_by_everything_that_reads_it(
    wrong: dict[str, str], sd3_dir: Path, tmp_path: Path
) -> None:
    backbone = load_backbone(sd3_dir)
    backbone.add_lora(2, 3.0)
    backbone.save_weights(tmp_path)
    file = tmp_path / LORA_FILE
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, metadata={**metadata, **wrong})
    with pytest.raises(DiffalignError, match="its metadata is damaged"):
        load_backbone(sd3_dir).load_weights(tmp_path)
    with pytest.raises(DiffalignError, match="cannot be read as a LoRA"):
        export_diffusers(tmp_path, "transformer", tmp_path)
    with pytest.raises(DiffalignError, match="is damaged"):
        extrapolate_lora(tmp_path, None, 0.5, tmp_path / "out")


def test_a_layer_without_a_name_there_is_refused() -> None:
    state = {f"encoder_hid_proj.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    with pytest.raises(DiffalignError, match="has no name for encoder_hid_proj.lora_A.weight; use --format diffusers"):
        to_kohya(state, 1.0, unet_place, {"layers_per_block": 2, "block_out_channels": [1, 2]})
