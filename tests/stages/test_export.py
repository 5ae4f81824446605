"""Exports: each layout gives the tuned image again in plain diffusers, and the card is the hub's and inert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffalign.errors import DiffalignError
from diffalign.pipelines.kohya import KOHYA_FILE, diffusers_place, to_kohya
from diffalign.pipelines.lora_file import LORA_FILE
from diffalign.pipelines.original_names import unet_place
from diffalign.pipelines.save_single_file import SINGLE_FILE
from diffalign.report.model_card import front_matter
from diffalign.stages.export import export
from helpers.command_line import refused
from helpers.tuned_run import PROMPT, SEED, SIZE, options_of, tuned_run


def plain_image(pipeline: Any, **options: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    given = {
        "num_inference_steps": 3,
        "guidance_scale": 2.0,
        "generator": generator,
        "output_type": "np",
        **SIZE,
        **options,
    }
    return pipeline(PROMPT, **given).images[0]


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_every_format_draws_the_tuned_image(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """diffusers reads kohya's layout of SD1.5 and SDXL; that of SD3 not, that of FLUX only at FLUX's width."""
    from diffusers import DiffusionPipeline

    model = request.getfixturevalue(f"{family}_dir")
    tuned = tuned_run(tmp_path / "run", model)
    options = options_of(model)
    out = export(tmp_path / "run", tmp_path / "both")
    assert {file.name for file in out.glob("*.safetensors")} == {LORA_FILE, KOHYA_FILE}
    for form, file in (("diffusers", LORA_FILE), ("kohya", KOHYA_FILE)):
        alone = export(tmp_path / "run", tmp_path / form, form)
        assert [f.name for f in alone.glob("*.safetensors")] == [file]
        assert (alone / file).read_bytes() == (out / file).read_bytes()
        if form == "kohya" and family in ("sd3", "flux"):
            continue
        pipeline = DiffusionPipeline.from_pretrained(model)
        pipeline.load_lora_weights(out, weight_name=file)
        assert np.abs(plain_image(pipeline, **options) - tuned).max() < 1e-4, form
    out = export(tmp_path / "run", tmp_path / "merged", "merged")
    pipeline = DiffusionPipeline.from_pretrained(out)
    assert np.abs(plain_image(pipeline, **options) - tuned).max() < 1e-3


def test_merged_is_base_plus_adapter(tmp_path: Path, sdxl_dir: Path) -> None:
    """W + alpha / rank B A, layer by layer, computed here from the LoRA's file, whose B holds alpha / rank."""
    from diffusers import UNet2DConditionModel

    tuned_run(tmp_path / "run", sdxl_dir)
    out = export(tmp_path / "run", tmp_path / "merged", "merged")
    base, merged = (
        UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict() for folder in (sdxl_dir, out)
    )
    with safe_open(tmp_path / "run/weights" / LORA_FILE, "pt") as file:
        lora = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    adapted = {key.removeprefix("unet.").removesuffix(".lora_A.weight") for key in lora if ".lora_A." in key}
    assert adapted
    for key, value in base.items():
        name = key.removesuffix(".weight")
        if name in adapted:
            value = value + lora[f"unet.{name}.lora_B.weight"] @ lora[f"unet.{name}.lora_A.weight"]
        assert torch.allclose(merged[key], value, atol=1e-5), key


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_half_precision_and_one_file(kind: str, tmp_path: Path, sd15_dir: Path) -> None:
    """A float16 model is half as large, and its card's snippet loads the file that lies beside it."""
    from diffusers import StableDiffusionPipeline

    tuned = tuned_run(tmp_path / "run", sd15_dir, kind)
    whole, half = (
        export(tmp_path / "run", tmp_path / dtype, "single-file", dtype=dtype) for dtype in ("float32", "float16")
    )
    sizes = [(out / SINGLE_FILE).stat().st_size for out in (whole, half)]
    assert sizes[1] < 0.6 * sizes[0]
    read = StableDiffusionPipeline.from_single_file(
        str(whole / SINGLE_FILE), config=str(sd15_dir), local_files_only=True
    )
    assert np.abs(plain_image(read) - tuned).max() < 1e-3
    card = (half / "README.md").read_text()
    assert "| `model.safetensors` | ComfyUI, A1111 and Forge; diffusers' `from_single_file` |" in card
    assert 'pipeline = StableDiffusionPipeline.from_single_file("model.safetensors")' in card
    merged = export(tmp_path / "run", tmp_path / "merged", "merged", dtype="float16")
    assert {v.dtype for v in load_file(merged / "unet/diffusion_pytorch_model.safetensors").values()} == {torch.float16}


def test_all_weights(tmp_path: Path, sdxl_dir: Path) -> None:
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    tuned = tuned_run(tmp_path / "run", sdxl_dir, kind="full")
    out = export(tmp_path / "run", tmp_path / "trunk", "diffusers")
    pipeline = DiffusionPipeline.from_pretrained(sdxl_dir)
    pipeline.register_modules(unet=UNet2DConditionModel.from_pretrained(out, subfolder="unet"))
    assert np.abs(plain_image(pipeline) - tuned).max() < 1e-4
    merged = DiffusionPipeline.from_pretrained(export(tmp_path / "run", tmp_path / "merged", "merged"))
    assert np.abs(plain_image(merged) - tuned).max() < 1e-4
    with pytest.raises(DiffalignError, match="trained all weights"):
        export(tmp_path / "run", tmp_path / "kohya", "kohya")


SDXL = {"layers_per_block": 2, "block_out_channels": [320, 640, 1280]}


def test_kohya_names() -> None:
    """Names as the trainer's own files have them: diffusers' blocks for SD1.5, Stability's for SDXL (n = 2 resnets)."""
    modules = {
        "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2": "input_blocks_8_1_transformer_blocks_9_ff_net_2",
        "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_v": "output_blocks_2_1_transformer_blocks_0_attn2_to_v",
        "up_blocks.1.attentions.0.transformer_blocks.1.attn1.to_k": "output_blocks_3_1_transformer_blocks_1_attn1_to_k",
    }  # fmt: skip
    shapes = {"A": (4, 8), "B": (16, 4)}
    state = {f"unet.{m}.lora_{x}.weight": torch.ones(shape) for m in modules for x, shape in shapes.items()}
    named = {key.removeprefix("unet."): value for key, value in state.items()}
    made = to_kohya(named, 3.0 / 4, unet_place, SDXL)
    stems = {f"lora_unet_{name}" for name in modules.values()}
    assert set(made) == {f"{s}.{end}" for s in stems for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    for stem in stems:
        assert made[f"{stem}.lora_down.weight"].shape == (4, 8) and made[f"{stem}.lora_up.weight"].shape == (16, 4)
        assert made[f"{stem}.alpha"].shape == () and made[f"{stem}.alpha"] == 3.0
    plain = {f"lora_unet_{m.replace('.', '_')}" for m in modules}
    assert {key.split(".")[0] for key in to_kohya(named, 0.75, diffusers_place, SDXL)} == plain
    for name in list(modules):  # the same names, whatever else has an adapter
        alone = {key: value for key, value in named.items() if key.startswith(f"{name}.")}
        assert set(to_kohya(alone, 0.75, unet_place, SDXL)) < set(made)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_kohya_file_is_what_its_definition_says(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """W + alpha / rank up down, put by hand into the layer that each key names: the tuned image, without any loader."""
    from diffusers import DiffusionPipeline

    model = request.getfixturevalue(f"{family}_dir")
    tuned = tuned_run(tmp_path / "run", model)
    file = export(tmp_path / "run", tmp_path / "kohya", "kohya") / "kohya_lora.safetensors"
    with safe_open(file, "pt") as opened:
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    pipeline = DiffusionPipeline.from_pretrained(model)
    n = pipeline.unet.config.layers_per_block
    by_key = {}
    for name, layer in pipeline.unet.named_modules():
        key = name
        for side, kind in (("down_blocks", "input_blocks"), ("up_blocks", "output_blocks")):
            if family == "sdxl" and name.startswith(side) and ".attentions." in name and name.count(".") > 3:
                _, i, _, j, rest = name.split(".", 4)
                key = f"{kind}.{int(i) * (n + 1) + int(j) + (side == 'down_blocks')}.1.{rest}"
        if family == "sdxl":
            key = key.replace("mid_block.attentions.0", "middle_block.1")
        by_key[f"lora_unet_{key.replace('.', '_')}"] = layer
    stems = {key.split(".")[0] for key in state}
    assert stems and (any("input_blocks" in stem for stem in stems) == (family == "sdxl"))
    with torch.no_grad():
        for stem in stems:
            up, down = state[f"{stem}.lora_up.weight"], state[f"{stem}.lora_down.weight"]
            change = state[f"{stem}.alpha"] / len(down) * up.flatten(1) @ down.flatten(1)
            by_key[stem].weight += change.view(by_key[stem].weight.shape)
    assert np.abs(plain_image(pipeline) - tuned).max() < 1e-3


# --- the verb --------------------------------------------------------------------------------------------------------


def test_mistakes(tmp_path: Path, sdxl_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not a run directory" in refused(capsys, "export", tmp_path)
    tuned_run(tmp_path / "run", sdxl_dir)
    assert "one of weights, diffusers, kohya, peft, merged, single-file" in refused(
        capsys, "export", tmp_path / "run", "--format", "safetensors"
    )
    for given in (
        ("--dtype", "float16"),
        ("--format", "merged", "--dtype", "fp8"),
        ("--format", "kohya", "--dtype", "bfloat16"),
    ):
        assert "only with --format merged or single-file" in refused(capsys, "export", tmp_path / "run", *given)
    assert "it had no validation" in refused(capsys, "export", tmp_path / "run", "--best")
    assert "named owner/name" in refused(capsys, "export", tmp_path / "run", "--push", "https://x/y")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious.txt").write_text("mine")
    assert "not empty" in refused(capsys, "export", tmp_path / "run", "--out", tmp_path / "full")


def test_push_by_name_only(
    tmp_path: Path, sdxl_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options))

        def upload_folder(self, **options: Any) -> None:
            calls.append((options["repo_id"], options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    tuned_run(tmp_path / "run", sdxl_dir)
    export(tmp_path / "run", tmp_path / "out", push="me/model", private=True, base="them/base")
    assert [name for name, _ in calls] == ["me/model", "me/model"] and calls[0][1]["private"]
    assert calls[1][1]["folder_path"] == str(tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert 'pipeline.load_lora_weights("me/model", weight_name="pytorch_lora_weights.safetensors")' in card
    assert (
        'from_pretrained("them/base")' in card and front_matter(tmp_path / "out/README.md")["base_model"] == "them/base"
    )

    def no_login(self: Hub, name: str, **options: Any) -> None:
        raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr(Hub, "create_repo", no_login)
    pushed = ("--push", "me/model", "--base", "them/base")
    assert "hf auth login" in refused(capsys, "export", tmp_path / "run", *pushed)
    assert (tmp_path / "run/export/weights/README.md").is_file()  # the export itself is kept
    errors = (ValueError("Invalid metadata in README.md"), OSError("no network"))
    for error in errors:

        def upload(self: Hub, name: str, error: Exception = error, **options: Any) -> None:
            raise error

        monkeypatch.setattr(Hub, "create_repo", upload)
        assert f"the hub refused ({error})" in refused(capsys, "export", tmp_path / "run", *pushed)
