"""Checkpoints in one file equal the folders that they were written from: every tensor, and what the models predict.

The pipelines have the real depth and a tiny width. `original_layout` writes the files, without diffusers' loaders.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffalign.pipelines import load_backbone
from diffalign.pipelines.generator import load_generator
from diffalign.pipelines.loading import pipeline_class
from diffalign.pipelines.single_file import CONFIGS, clip_tokenizer
from helpers import original_layout, tiny
from helpers.refusals import refused

LENGTH = 16


def text_encoder(kind: Any, layers: int, width: int) -> Any:
    config = tiny._clip_config(width, LENGTH, width)
    config.num_hidden_layers = layers
    return kind(config)


def vae(channels: int = 4, **options: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 8, 8, 8), norm_num_groups=2, layers_per_block=2, latent_channels=channels, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **options,
    )  # fmt: skip


def sd15(folder: Path) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    given = json.loads((CONFIGS / "sd15/unet/config.json").read_text())
    small = {"block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4, "cross_attention_dim": 16, "sample_size": 8}
    unet = UNet2DConditionModel.from_config({**given, **small, "attention_head_dim": 2})
    StableDiffusionPipeline(
        unet=unet, vae=vae(), text_encoder=text_encoder(CLIPTextModel, 12, 16), tokenizer=tiny.clip_tokenizer(LENGTH),
        scheduler=tiny._ddim("epsilon"), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def sdxl(folder: Path) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    given = json.loads((CONFIGS / "sdxl/unet/config.json").read_text())
    small = {
        "block_out_channels": (8, 16, 32), "norm_num_groups": 4, "cross_attention_dim": 40, "sample_size": 8,
        "attention_head_dim": (2, 2, 4), "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 24,
    }  # fmt: skip
    StableDiffusionXLPipeline(
        unet=UNet2DConditionModel.from_config({**given, **small}), vae=vae(),
        scheduler=EulerDiscreteScheduler(**tiny._betas("epsilon")), add_watermarker=False,
        text_encoder=text_encoder(CLIPTextModel, 12, 16), tokenizer=tiny.clip_tokenizer(LENGTH),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, 32, 24), tokenizer_2=tiny.clip_tokenizer(LENGTH, "!"),
    ).save_pretrained(folder)  # fmt: skip


def sd3(folder: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=24, num_attention_heads=2,
        attention_head_dim=8, joint_attention_dim=40, caption_projection_dim=16, pooled_projection_dim=40,
        pos_embed_max_size=16,
    )  # fmt: skip
    first = text_encoder(CLIPTextModelWithProjection, 12, 16)
    nn.init.eye_(first.text_projection.weight)  # SD3's file has no projection for CLIP-L
    t5 = T5EncoderModel(T5Config(vocab_size=98, d_model=40, d_kv=8, d_ff=32, num_layers=4, num_heads=2))
    StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=first, tokenizer=tiny.clip_tokenizer(LENGTH),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, 32, 24), tokenizer_2=tiny.clip_tokenizer(LENGTH, "!"),
        text_encoder_3=t5, tokenizer_3=tiny.t5_tokenizer(),
    ).save_pretrained(folder)  # fmt: skip


BUILDERS: dict[str, Callable[[Path], None]] = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A folder, and the same weights in a file, of each family."""
    from diffusers import DiffusionPipeline

    found = {}
    for name, build in BUILDERS.items():
        folder = tmp_path_factory.mktemp(name) / "folder"
        torch.manual_seed(3)
        build(folder)
        state = original_layout.whole(DiffusionPipeline.from_pretrained(folder))
        found[name] = (folder, original_layout.write(folder.parent / f"{name}.safetensors", state))
    return found


def tensors(backbone: Any) -> dict[str, torch.Tensor]:
    networks = {n: m for n, m in backbone.pipeline.components.items() if isinstance(m, nn.Module)}
    return {f"{n}.{k}": v for n, m in networks.items() for k, v in m.state_dict().items()}


def predict(backbone: Any) -> torch.Tensor:
    noisy = torch.randn(2, backbone.latent_channels, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return backbone.predict(noisy, torch.full((2,), 400.0), backbone.encode_prompts(["a cat", "two dogs"]))


@pytest.mark.parametrize("name", BUILDERS)
def test_a_file_equals_its_folder(name: str, models: dict[str, tuple[Path, Path]]) -> None:
    folder, file = models[name]
    ours, theirs = load_backbone(file, config=str(folder)), load_backbone(folder)
    got, wanted = tensors(ours), tensors(theirs)
    assert got.keys() == wanted.keys() and all(torch.equal(got[k], wanted[k]) for k in wanted)
    assert torch.equal(predict(ours), predict(theirs)) and ours.family == name
    size = {"height": 64, "width": 64}
    images = [b.sample(["a cat"], [5], steps=2, guidance_scale=3.0, **size)[0].tobytes() for b in (ours, theirs)]
    assert images[0] == images[1]
    assert pipeline_class(str(file), config=str(folder)) == type(theirs.pipeline).__name__
    assert (
        ours.fingerprint() != theirs.fingerprint()
        and ours.fingerprint() == load_backbone(file, config=str(folder)).fingerprint()
    )


def test_half_precision_and_generators(models: dict[str, tuple[Path, Path]]) -> None:
    folder, file = models["sdxl"]
    ours = load_backbone(file, config=str(folder), dtype=torch.bfloat16)
    assert ours.pipeline.vae.dtype == torch.float32 and ours.trunk.dtype == torch.bfloat16
    assert torch.equal(predict(ours), predict(load_backbone(folder, dtype=torch.bfloat16)))
    generator = load_generator(file, config=str(folder))
    assert torch.equal(predict(generator.backbone), predict(load_backbone(folder)))


def test_sd3_without_t5(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder, file = models["sd3"]
    state = {k: v for k, v in load_file(file).items() if "t5xxl" not in k}
    less = original_layout.write(tmp_path / "less.safetensors", state)
    ours = load_backbone(less, config=str(folder), max_sequence_length=12)
    assert ours.pipeline.text_encoder_3 is None
    assert torch.equal(predict(ours), predict(load_backbone(folder, use_t5=False, max_sequence_length=12)))


def test_the_configs_that_we_bring_are_those_of_the_published_models() -> None:
    """Numbers of parameters as published; the UNets of SD1.5 and SDXL are known by them."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def count(name: str, kind: Any) -> int:
        with init_empty_weights():
            if kind in (UNet2DConditionModel, AutoencoderKL):
                model = kind.from_config(kind.load_config(CONFIGS / name))
            else:
                model = kind(CLIPTextConfig.from_pretrained(CONFIGS / name))
        return sum(p.numel() for p in model.parameters())

    assert count("sd15/unet", UNet2DConditionModel) == 859_520_964
    assert count("sdxl/unet", UNet2DConditionModel) == 2_567_463_684
    assert count("sd15/vae", AutoencoderKL) == count("sdxl/vae", AutoencoderKL) == 83_653_863
    assert count("sd15/text_encoder", CLIPTextModel) == count("sdxl/text_encoder", CLIPTextModel) == 123_060_480
    assert count("sdxl/text_encoder_2", CLIPTextModelWithProjection) == 694_659_840
    for folder, kind in (("sd15", PNDMScheduler), ("sdxl", EulerDiscreteScheduler)):
        scheduler = kind.from_pretrained(CONFIGS / folder, subfolder="scheduler")
        # Published first and last values of Stable Diffusion's schedule.
        assert float(scheduler.alphas_cumprod[0]) == pytest.approx(0.99915, abs=1e-5)
        assert float(scheduler.alphas_cumprod[999]) == pytest.approx(0.004660, abs=1e-6)


def test_clips_tokenizer_without_a_download() -> None:
    """The ids of OpenAI's CLIP, by open_clip's own tokenizer."""
    import open_clip

    theirs = open_clip.get_tokenizer("ViT-L-14")
    for prompt in ("a photo of a cat", "Two DOGS, 3 cups & a naïve café!", "", "don't  stop 日本", "x" * 300):
        ids = clip_tokenizer("<|endoftext|>", 77)([prompt], padding="max_length", truncation=True).input_ids
        wanted = theirs([prompt])[0].tolist()
        end = wanted.index(49407)
        assert ids[0][: end + 1] == wanted[: end + 1] and set(ids[0][end:]) == {49407}
    assert clip_tokenizer("!", 77)(["a"], padding="max_length").input_ids[0][-1] == 0


def without(part: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def damage(state: dict[str, torch.Tensor]) -> None:
        for key in [k for k in state if part in k]:
            del state[key]

    return damage


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("sd15", without("middle_block.1.proj_in.weight"), "its unet has"),
        ("sd15", without("input_blocks.1.1.transformer_blocks.0.attn1.to_q"), "its unet has"),
        ("sd15", without("encoder.layers.11."), "of text_encoder are missing"),
        ("sd15", without("cond_stage_model."), "cannot be loaded as StableDiffusionPipeline"),
        ("sd15", without("first_stage_model."), "its vae has 0 weights"),
        ("sd15", without("decoder.conv_out.bias"), "its vae has"),
        ("sd15", without("model.diffusion_model."), "holds no UNet or transformer of a whole checkpoint"),
        ("sd15", lambda s: s.update({"model.diffusion_model.more": torch.ones(3)}), "its unet has"),
        ("sd15", lambda s: s.update({"v_pred": torch.zeros(0)}), "was trained with prediction_type: v_prediction"),
        ("sd15", lambda s: s.update({"ztsnr": torch.zeros(0)}), "was trained with rescale_betas_zero_snr: true"),
        ("sd15", lambda s: s.clear(), "holds no UNet or transformer of a whole checkpoint (0 tensors"),
        ("sdxl", without("resblocks.31."), "of text_encoder_2 are missing"),
        ("sdxl", without("label_emb"), "its unet has"),
        ("sd3", without("joint_blocks.23."), "its transformer has"),
        ("sd3", without("t5xxl.transformer.encoder.block.3."), "of text_encoder_3 are missing"),
        ("sd3", without("clip_g"), "cannot be loaded as StableDiffusion3Pipeline"),
    ],
)  # fmt: skip
def test_files_that_are_not_whole(
    name: str, damage: Callable[[dict[str, torch.Tensor]], object], words: str, models: dict[str, tuple[Path, Path]],
    tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from safetensors.torch import load_file

    folder, file = models[name]
    state = load_file(file)
    damage(state)
    other = original_layout.write(tmp_path / "x.safetensors", state)
    line = refused(lambda: load_backbone(other, config=str(folder)), capfd)
    assert any(word in line for word in words.split("|")) and str(other) in line, line


def test_other_refusals(
    models: dict[str, tuple[Path, Path]], flux_dir: Path, sd15_dir: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder, file = models["sd15"]
    (tmp_path / "x.ckpt").write_bytes(b"pickle")
    assert "only .safetensors files are read" in refused(lambda: load_backbone(tmp_path / "x.ckpt"), capfd)
    for content in (b"", b"junk" * 99, file.read_bytes()[:-10]):
        (tmp_path / "x.safetensors").write_bytes(content)
        assert "is damaged or no safetensors file" in refused(lambda: load_backbone(tmp_path / "x.safetensors"), capfd)
    assert "model.revision" in refused(lambda: load_backbone(file, revision="main", config=str(folder)), capfd)
    assert "model.config: " in refused(lambda: load_backbone(sd15_dir, config=str(folder)), capfd)
    assert "sd15_" not in refused(lambda: load_backbone(file, config=str(flux_dir)), capfd)
    # Ours describe the published widths, which this file does not have.
    assert "its unet has" in refused(lambda: load_backbone(file), capfd)
    shutil.copytree(folder, tmp_path / "evil")
    path = tmp_path / "evil/text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModel": "evil.Evil"}}))
    assert "names code of its own" in refused(lambda: load_backbone(file, config=str(tmp_path / "evil")), capfd)
    # SD3's configs are not ours to bring: one line says what to fetch.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert "its kind of model is not known" in refused(lambda: load_backbone(models["sd3"][1]), capfd)
    keys = {"joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,), "pos_embed": (1, 36864, 1)}
    state = {f"model.diffusion_model.{key}": torch.zeros(shape) for key, shape in keys.items()}
    large = original_layout.write(tmp_path / "sd3.safetensors", state)
    line = refused(lambda: load_backbone(large), capfd)
    assert "hf download stabilityai/stable-diffusion-3" in line and "then set model.config=" in line
    assert '.safetensors"' not in line


def test_our_configs_are_used_without_any_other(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With configs of a tiny model in place of ours: kind, tokenizers and configs need no folder and no network."""
    from diffusers import DiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    from diffalign.pipelines import single_file

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    given = json.loads((CONFIGS / "sd15/text_encoder/config.json").read_text())
    encoder = CLIPTextModel(CLIPTextConfig(**{**given, **small}))
    pipeline = DiffusionPipeline.from_pretrained(
        models["sd15"][0], text_encoder=encoder, tokenizer=clip_tokenizer("<|endoftext|>", 77), safety_checker=None
    )
    pipeline.save_pretrained(tmp_path / "folder")
    file = original_layout.write(tmp_path / "x.safetensors", original_layout.whole(pipeline))
    ours = tmp_path / "configs/sd15"
    shutil.copytree(CONFIGS / "sd15", ours)
    for part in ("unet", "vae", "text_encoder"):
        shutil.copy(tmp_path / "folder" / part / "config.json", ours / part)
    shutil.copy(tmp_path / "folder/scheduler/scheduler_config.json", ours / "scheduler")
    monkeypatch.setattr(single_file, "CONFIGS", tmp_path / "configs")
    assert torch.equal(predict(load_backbone(file)), predict(load_backbone(tmp_path / "folder")))
