"""LoRAs that others saved come in whole, at their own strength.

The oracle adds strength x B A to the weights of a second model by hand and compares what the two predict. The files are
written under the names that each program uses, without diffusers or peft.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.errors import DiffalignError
from diffalign.pipelines import load_backbone
from diffalign.pipelines.generator import load_generator
from helpers.lora_files import (
    CONVOLUTIONS,
    SD3,
    UNET,
    Deltas,
    as_kohya,
    as_peft,
    deltas,
    former,
    merged,
    peft_folder,
    predict,
    sgm,
    shared,
    untouched,
    write,
)

ATTENTION = UNET[:4]
LAYOUTS: dict[str, tuple[str, tuple[str, ...], tuple[float, ...], tuple[int, ...], Callable[[Path, Deltas], Path]]] = {
    "diffusers": ("sd15_dir", UNET, (2,), (2,), lambda f, d: write(f, as_peft(d, "unet."))),
    "diffusers, float16": (
        "sd15_dir", UNET, (2,), (2,), lambda f, d: write(f, {k: v.half() for k, v in as_peft(d, "unet.").items()}),
    ),
    "diffusers with its metadata": (
        "sdxl_dir", UNET, (5,), (2,),
        lambda f, d: write(f, as_peft(d, "unet."), lora_adapter_metadata={"unet.r": 2, "unet.lora_alpha": 5}),
    ),
    "diffusers, alphas by layer": (
        "sd3_dir", SD3, (5, 1, 1), (2,),
        lambda f, d: write(
            f, as_peft(d, "transformer."),
            lora_adapter_metadata={
                "transformer.r": 2, "transformer.lora_alpha": 1, "transformer.alpha_pattern": {SD3[0]: 5},
            },
        ),
    ),
    "alpha tensors beside diffusers' names": (
        "sd3_dir", SD3, (6,), (2,),
        lambda f, d: write(
            f, as_peft(d, "transformer.") | {f"transformer.{n}.alpha": torch.tensor(6.0) for n in d},
            lora_adapter_metadata={"transformer.r": 2, "transformer.lora_alpha": 6},
        ),
    ),
    "diffusers, without a prefix": ("sd15_dir", UNET, (3,), (3,), lambda f, d: write(f, as_peft(d, ""))),
    "diffusers' former names": (
        "sd15_dir", UNET, (2,), (2,),
        lambda f, d: write(f, as_peft(d, "unet.", (".lora.down.weight", ".lora.up.weight"))),
    ),
    "processors": ("sd15_dir", ATTENTION, (2,), (2,), lambda f, d: write(f, former(d))),
    "kohya": ("sd15_dir", UNET, (1,), (2,), lambda f, d: write(f, as_kohya(d))),
    "kohya, alphas by layer": ("sd15_dir", UNET, (1, 2, 7), (2,), lambda f, d: write(f, as_kohya(d))),
    "kohya, ranks by layer": ("sd15_dir", UNET, (1, 2, 7), (2, 3), lambda f, d: write(f, as_kohya(d))),
    "kohya, ranks by layer at one strength": ("sd15_dir", UNET, (2, 3), (2, 3), lambda f, d: write(f, as_kohya(d))),
    "kohya without alphas": (
        "sd15_dir", UNET, (2,), (2,),
        lambda f, d: write(f, {k: v for k, v in as_kohya(d).items() if "alpha" not in k}),
    ),
    "LoCon": ("sd15_dir", UNET + CONVOLUTIONS, (1, 2, 4), (2,), lambda f, d: write(f, as_kohya(d))),
    "LoCon in one file": (
        "sd15_dir", UNET + CONVOLUTIONS, (1,), (2,), lambda f, d: write(f, as_kohya(d), "my lora.safetensors"),
    ),
    "kohya of SDXL": ("sdxl_dir", UNET, (1,), (2,), lambda f, d: write(f, as_kohya(d, sgm))),
    "kohya of SDXL, alphas by layer": ("sdxl_dir", UNET, (1, 3), (2,), lambda f, d: write(f, as_kohya(d, sgm))),
    "kohya of SDXL, diffusers' blocks": ("sdxl_dir", UNET, (1, 3), (2,), lambda f, d: write(f, as_kohya(d))),
    "PEFT": ("sd3_dir", SD3, (5,), (2,), lambda f, d: peft_folder(f, d, r=2, lora_alpha=5)),
    "PEFT of a UNet": ("sd15_dir", UNET, (5,), (2,), lambda f, d: peft_folder(f, d, r=2, lora_alpha=5)),
    "PEFT, rank-stabilised": (
        "sd3_dir", SD3, (4 * 4**0.5,), (4,), lambda f, d: peft_folder(f, d, r=4, lora_alpha=4, use_rslora=True),
    ),
    "PEFT, ranks and alphas by layer": (
        "sd3_dir", SD3, (5, 1), (2, 3),
        lambda f, d: peft_folder(
            f, d, r=2, lora_alpha=5, rank_pattern={"add_v_proj": 3}, alpha_pattern={r".*1\.attn\.add_v_proj": 1}
        ),
    ),
    "metadata that names other targets": (
        "sd15_dir", UNET, (2,), (2,),
        lambda f, d: write(
            f, as_peft(d, "unet."),
            lora_adapter_metadata={"unet.r": 2, "unet.lora_alpha": 2, "unet.target_modules": ["to_q"]},
        ),
    ),
    "PEFT, the adapter's name in the keys": (
        "flux_dir", ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_v"), (5,), (2,),
        lambda f, d: _default_names(peft_folder(f, d, r=2, lora_alpha=5)),
    ),
}  # fmt: skip


def _default_names(folder: Path) -> Path:
    state = load_file(folder / "adapter_model.safetensors")
    return write(
        folder, {k.replace(".weight", ".default.weight"): v for k, v in state.items()}, "adapter_model.safetensors"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model, names, alphas, ranks, save = LAYOUTS[layout]
    folder: Path = request.getfixturevalue(model)
    backbone = shared(folder)
    layers = deltas(untouched(folder), names, alphas, ranks)
    if "float16" in layout:
        layers = {n: (down.half().float(), up.half().float(), s) for n, (down, up, s) in layers.items()}
    path = save(tmp_path / "lora", layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a file that is used in full is no reason for a warning
        backbone.load_weights(path)
    wanted = merged(folder, layers)
    assert (predict(backbone) - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))
    with backbone.role("reference"):
        assert torch.equal(predict(backbone), predict(untouched(folder)))

    # What is saved from it does the same again.
    backbone.save_weights(tmp_path / "again")
    backbone.load_weights(tmp_path / "again")
    assert (predict(backbone) - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))


def test_fused_layers_of_flux(flux_dir: Path, tmp_path: Path) -> None:
    """kohya's FLUX files adapt q, k and v as one layer; alphas differ by layer."""
    generator = torch.Generator().manual_seed(1)
    state, layers = {}, {}
    for old, new, alpha in (
        ("double_blocks_0_img_attn_qkv", "to_{}", 1.0), ("double_blocks_0_txt_attn_qkv", "add_{}_proj", 6.0),
    ):  # fmt: skip
        down, up = torch.randn(2, 32, generator=generator) * 0.3, torch.randn(96, 2, generator=generator) * 0.3
        state |= {f"lora_unet_{old}.lora_down.weight": down, f"lora_unet_{old}.lora_up.weight": up}
        state[f"lora_unet_{old}.alpha"] = torch.tensor(alpha)
        for kind, part in zip("qkv", up.chunk(3), strict=True):
            layers[f"transformer_blocks.0.attn.{new.format(kind)}"] = (down, part, alpha / 2)
    backbone = load_backbone(flux_dir)
    backbone.load_weights(write(tmp_path, state))
    wanted = merged(flux_dir, layers)
    assert (predict(backbone) - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))


def test_a_foreign_lora_is_trained_on_and_drawn_from(sd15_dir: Path, sd3_dir: Path, tmp_path: Path) -> None:
    for folder, save in (
        (sd15_dir, lambda f, d: write(f, as_kohya(d))),
        (sd3_dir, lambda f, d: peft_folder(f, d, r=2, lora_alpha=5)),
    ):
        names = UNET if folder == sd15_dir else SD3
        path = tmp_path / folder.parent.name
        layers = deltas(untouched(folder), names, (5,))
        save(path, layers)
        backbone = load_backbone(folder)
        backbone.add_lora(2, 5, init=path)
        wanted = merged(folder, layers)
        bound = 1e-5 * max(1.0, float(wanted.abs().max()))
        assert (predict(backbone) - wanted).abs().max() < bound and len(backbone.trainable()) == 2 * len(names)
        with backbone.role("reference"):
            assert (predict(backbone) - wanted).abs().max() < bound
        generator = load_generator(folder)
        generator.load_weights(path)
        assert (predict(generator.backbone) - wanted).abs().max() < bound


def test_alphas_by_layer_are_trained_on_at_strength_one(sd15_dir: Path, tmp_path: Path) -> None:
    layers = deltas(untouched(sd15_dir), UNET, (1, 5))
    write(tmp_path, as_kohya(layers))
    backbone = load_backbone(sd15_dir)
    with pytest.raises(DiffalignError, match="set tune.rank: 2 and tune.alpha: 2"):
        load_backbone(sd15_dir).add_lora(2, 5, init=tmp_path)
    backbone.add_lora(2, 2, init=tmp_path)
    assert (predict(backbone) - merged(sd15_dir, layers)).abs().max() < 1e-5


def test_text_encoders_are_refused_or_ignored_as_asked(sd15_dir: Path, sd3_dir: Path, tmp_path: Path) -> None:
    for number, (folder, names, save, more) in enumerate(
        (
            (sd15_dir, UNET, as_kohya, {"lora_te_text_model_encoder_layers_0_mlp_fc1.dora_scale": torch.ones(2)}),
            (sd15_dir, UNET, as_kohya, {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())}),
            (sd3_dir, SD3, lambda d: as_peft(d, "transformer."), {"text_encoder.x.lora_A.weight": torch.ones(2, 2)}),
            (sd3_dir, SD3, lambda d: as_peft(d, "transformer."), {"text_encoder_2.x.lora_A.weight": torch.ones(2, 2)}),
        )
    ):
        layers = deltas(untouched(folder), names, (2,))
        path = write(tmp_path / str(number), save(layers) | more)
        with pytest.raises(DiffalignError, match="adapts text encoders too.*set model.lora_text_encoders=ignore"):
            load_backbone(folder).load_weights(path)
        backbone = load_backbone(folder, lora_text_encoders="ignore")
        backbone.load_weights(path)
        assert (predict(backbone) - merged(folder, layers)).abs().max() < 1e-5
    (tmp_path / "none").mkdir()
    write(tmp_path / "none", {"lora_te_text_model_x.lora_down.weight": torch.ones(2, 2)})
    with pytest.raises(DiffalignError, match="holds no LoRA of a unet"):
        load_backbone(sd15_dir, lora_text_encoders="ignore").load_weights(tmp_path / "none")


def test_fused_layers_of_sd3(sd3_dir: Path, tmp_path: Path) -> None:
    """As kohya's SD3 trainer names them; diffusers itself does not read these. The last modulation has its halves swapped."""
    generator = torch.Generator().manual_seed(1)
    state, layers = {}, {}

    def add(old: str, rows: int, into: int, alpha: float, parts: tuple[str, ...], swapped: bool = False) -> None:
        down, up = torch.randn(2, into, generator=generator) * 0.3, torch.randn(rows, 2, generator=generator) * 0.3
        stem = f"lora_unet_joint_blocks_{old}"
        state.update(
            {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(alpha)}
        )
        up = torch.cat(up.chunk(2)[::-1]) if swapped else up
        for name, part in zip(parts, up.chunk(len(parts)), strict=True):
            layers[f"transformer_blocks.{name}"] = (down, part, alpha / 2)

    add("0_x_block_attn_qkv", 48, 16, 1.0, ("0.attn.to_q", "0.attn.to_k", "0.attn.to_v"))
    add("1_context_block_attn_qkv", 48, 16, 6.0, ("1.attn.add_q_proj", "1.attn.add_k_proj", "1.attn.add_v_proj"))
    add("0_x_block_mlp_fc2", 16, 64, 2.0, ("0.ff.net.2",))
    add("1_context_block_adaLN_modulation_1", 32, 16, 3.0, ("1.norm1_context.linear",), swapped=True)
    backbone = load_backbone(sd3_dir)
    backbone.load_weights(write(tmp_path / "whole", state))
    wanted = merged(sd3_dir, layers)
    assert (predict(backbone) - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))

    for key, value in (
        ("lora_unet_joint_blocks_7_x_block_attn_qkv", 48),
        ("lora_unet_joint_blocks_1_x_block_attn_qkv", 47),
    ):
        more = {f"{key}.lora_down.weight": torch.ones(2, 16), f"{key}.lora_up.weight": torch.ones(value, 2)}
        with pytest.raises(DiffalignError, match=f"adapts {key}"):
            backbone.load_weights(write(tmp_path / key, state | more))
