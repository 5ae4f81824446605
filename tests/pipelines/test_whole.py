"""A model's folder comes in whole or is refused in one line, without a word of the libraries; no part is filled at random."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.pipelines import load_backbone
from diffalign.pipelines.generator import load_generator
from helpers.refusals import refused

Damage = Callable[[Path], object]

COMPONENTS = {
    "sd15_dir": ("unet", "vae", "text_encoder"),
    "sdxl_dir": ("text_encoder_2",),
    "sd3_dir": ("transformer", "text_encoder_3"),
}
PARTS = [(model, part) for model, parts in COMPONENTS.items() for part in parts]


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Damage:
    def damage(folder: Path) -> None:
        path = weights(folder)
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return damage


def index(change: Callable[[dict[str, str]], dict[str, str]]) -> Damage:
    """Cut the weights in two files with an index, and damage the index."""

    def damage(folder: Path) -> None:
        path = weights(folder)
        state = sorted(load_file(path).items())
        shards = {f"{path.stem}-0000{n}-of-00002.safetensors": dict(state[n - 1 :: 2]) for n in (1, 2)}
        path.unlink()
        for name, part in shards.items():
            save_file(part, folder / name, metadata={"format": "pt"})
        content = {"metadata": {}, "weight_map": change({key: name for name, part in shards.items() for key in part})}
        (folder / f"{path.name}.index.json").write_text(json.dumps(content))

    return damage


def written(content: bytes) -> Damage:
    return lambda folder: weights(folder).write_bytes(content)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "one is missing": (tensors(lambda s: dict(sorted(s.items())[1:])), "1 tensor is missing; first "),
    "renamed": (tensors(lambda s: {f"x.{k}": v for k, v in s.items()}), "tensors are missing; first "),
    "another name inside": (tensors(lambda s: {k.replace(".0.", ".7."): v for k, v in s.items()}), "missing; first "),
    "misshapen": (tensors(lambda s: {k: v[:-1].clone() for k, v in s.items()}), "of another shape; first "),
    "more layers": (tensors(lambda s: s | {k.replace(".0.", ".9."): v.clone() for k, v in s.items()}), "left over"),
    "empty": (written(b""), "is damaged or no safetensors file"),
    "junk": (written(b"junk" * 999), "is damaged or no safetensors file"),
    "a pointer of Git LFS": (written(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "cut": (lambda f: weights(f).write_bytes(weights(f).read_bytes()[:-9]), "is damaged or no safetensors file"),
    "an index without files": (index(lambda m: dict.fromkeys(m, "gone.safetensors")), "names gone.safetensors, which is"),
    "an index of a pickle": (index(lambda m: dict.fromkeys(m, "x.bin")), "only .safetensors files beside it are read"),
    "an index of a system file": (index(lambda m: dict.fromkeys(m, "../../../../etc/passwd")), "only .safetensors files"),
    "an index of another part": (index(lambda m: dict.fromkeys(m, "../a.safetensors")), "only .safetensors files"),
    "an index of half": (index(lambda m: {k: v for k, v in m.items() if "00001" in v}), "missing; first "),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("model", "part"), PARTS)
def test_parts(
    model: str, part: str, damage: str, request: pytest.FixtureRequest, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copytree(request.getfixturevalue(model), tmp_path / "model")
    change, words = DAMAGES[damage]
    change(tmp_path / "model" / part)
    line = refused(lambda: load_backbone(tmp_path / "model"), capfd)
    assert words in line and f"{part}" in line, line


def config(part: str, **changes: object) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def file(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def entry(name: str, library: str, kind: str) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: [library, kind]}))

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (config("text_encoder", num_hidden_layers=-1), "text_encoder"),
        (config("text_encoder", num_hidden_layers=0), "left over, so the config describes another model"),
        (config("text_encoder", num_hidden_layers=1), "left over, so the config describes another model"),
        (config("text_encoder_3", num_layers=0), "left over, so the config describes another model"),
        (config("transformer", num_layers=0), "left over, so the config describes another model"),
        (config("transformer", num_layers=1), "of another shape; first transformer_blocks.0"),
        (config("transformer", num_layers="two"), "transformer cannot be loaded as SD3Transformer2DModel"),
        (config("vae", block_out_channels=[]), "vae"),
        (config("vae", auto_map={"AutoModel": "evil.Evil"}), "vae/config.json|config.json names code of its own"),
        (config("text_encoder", attn_implementation="somebody/kernel"), "config.json names code of its own"),
        (file("text_encoder/config.json", "["), "config.json is not valid JSON"),
        (file("vae/config.json", "[" * 99999), "config.json is not valid JSON"),
        (file("model_index.json", "[" * 99999), "model_index.json is not valid JSON"),
        (file("tokenizer/tokenizer.json", "{}"), "cannot be loaded as StableDiffusion3Pipeline"),
        (file("tokenizer/tokenizer_config.json", '{"auto_map": {"AutoTokenizer": "evil.Evil"}}'), "names code of its own"),
        (file("scheduler/scheduler_config.json", "[]"), "cannot be loaded as StableDiffusion3Pipeline"),
        (entry("tokenizer", "transformers", "AutoTokenizer"), "is of class AutoTokenizer (transformers); the pipeline takes"),
        (entry("text_encoder", "transformers", "AutoModel"), "is of class AutoModel (transformers); the pipeline takes"),
        (entry("vae", "diffusers", "AutoModel"), "is of class AutoModel (diffusers); the pipeline takes AutoencoderKL"),
        (entry("vae", "diffusers", "AutoencoderTiny"), "the pipeline takes AutoencoderKL"),
        (entry("scheduler", "diffusers", "DiffusionPipeline"), "the pipeline takes a scheduler of diffusers"),
        (entry("scheduler", "transformers", "EvilScheduler"), "the pipeline takes a scheduler of diffusers"),
        (entry("scheduler", "diffusers", "NoScheduler"), "cannot be loaded as StableDiffusion3Pipeline"),
    ],
)  # fmt: skip
def test_configs(damage: Damage, words: str, sd3_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(sd3_dir, tmp_path / "model")
    damage(tmp_path / "model")
    line = refused(lambda: load_backbone(tmp_path / "model"), capfd)
    assert any(word in line for word in words.split("|")) and "model" in line, line


def test_what_older_and_larger_checkpoints_hold_is_accepted(sd15_dir: Path, sd3_dir: Path, tmp_path: Path) -> None:
    """The VAE's former names of attention, buffers in a text encoder, and networks of which only one half is used."""
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for new, old in former.items():
            state = {k.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v for k, v in state.items()}
        assert any("proj_attn" in key for key in state)
        return state

    folder = tmp_path / "sd15"
    shutil.copytree(sd15_dir, folder)
    tensors(rename)(folder / "vae")
    more = {"text_model.embeddings.position_ids": torch.arange(16)[None], "vision_model.x.weight": torch.ones(2)}
    tensors(lambda state: state | more | {"logit_scale": torch.ones(())})(folder / "text_encoder")
    tensors(lambda state: state)(folder / "unet")
    ours, plain = load_backbone(folder), load_backbone(sd15_dir)
    for part in ("vae", "text_encoder", "unet"):
        state, wanted = (b.pipeline.components[part].state_dict() for b in (ours, plain))
        assert state.keys() == wanted.keys() and all(torch.equal(state[k], wanted[k]) for k in state)

    folder = tmp_path / "sd3"
    shutil.copytree(sd3_dir, folder)
    decoder = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}
    tensors(lambda state: state | decoder)(folder / "text_encoder_3")
    index(lambda names: names)(folder / "transformer")
    load_backbone(folder)


def test_variants_are_named(sd15_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A folder with fp16 files only, a shard of them, and one that lacks the asked variant in a part."""
    folder = tmp_path / "model"
    shutil.copytree(sd15_dir, folder)
    unet = folder / "unet/diffusion_pytorch_model.safetensors"
    unet.rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    line = refused(lambda: load_backbone(folder), capfd)
    assert "unet/ holds no .safetensors weights but those of variant fp16; set model.variant=fp16" in line
    assert load_backbone(folder, variant="fp16").facts()["parameters"] == load_backbone(sd15_dir).facts()["parameters"]
    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").rename(
        folder / "unet/diffusion_pytorch_model.bf16-00001-of-00001.safetensors"
    )
    assert "those of variant bf16; set model.variant=bf16" in refused(lambda: load_backbone(folder), capfd)
    # What is not read may be a pointer, as in a clone without its large files; what only looks like weights is none.
    shutil.copy(sd15_dir / "unet/diffusion_pytorch_model.safetensors", unet)
    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\n"
    )
    load_backbone(folder)
    unet.rename(folder / "unet/lora.safetensors")
    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").unlink()
    (folder / "unet/diffusion_pytorch_model.bf16-00001-of-00001.safetensors").unlink()
    assert "unet/ holds no .safetensors weights" in refused(lambda: load_backbone(folder), capfd)


def test_generators_are_whole(sd3_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(sd3_dir, tmp_path / "model")
    tensors(lambda state: dict(sorted(state.items())[:-1]))(tmp_path / "model/text_encoder_2")
    assert "1 tensor is missing; first" in refused(lambda: load_generator(tmp_path / "model"), capfd)
