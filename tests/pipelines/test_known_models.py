"""Published models without their files: sizes as their authors state them, and plans without a network."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.config import list_recipes, load
from diffalign.data.writer import write_groups
from diffalign.pipelines.known_models import empty_conditioning, known_backbone, known_models
from helpers.command_line import run
from helpers.configs import kind_of
from helpers.small_datasets import group_rows, write_images

# The number of weights of each trunk, as the published checkpoints have it, and the sides of its latents.
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (859_520_964, 4, 512),
    "stabilityai/stable-diffusion-xl-base-1.0": (2_567_463_684, 4, 1024),
    "stabilityai/stable-diffusion-3-medium-diffusers": (2_028_328_000, 16, 1024),
    "stabilityai/stable-diffusion-3.5-medium": (2_243_171_520, 16, 1024),
    "stabilityai/stable-diffusion-3.5-large": (8_056_627_520, 16, 1024),
    "black-forest-labs/FLUX.1-dev": (11_901_408_320, 16, 1024),
}


def test_each_has_the_published_size() -> None:
    assert set(known_models()) == set(PUBLISHED)
    for path, (weights, channels, side) in PUBLISHED.items():
        backbone = known_backbone(path, dtype=torch.bfloat16)
        assert backbone.facts()["parameters"] == weights, path
        assert (backbone.latent_channels, backbone.default_resolution, backbone.vae_scale_factor) == (channels, side, 8)
        gated = path.startswith("black") or "diffusion-3" in path
        assert (known_models()[path].terms == f"https://huggingface.co/{path}") == gated
        backbone.add_lora(4, 4.0)
        assert sum(p.numel() for p in backbone.trainable().values()) > 100_000
        tokens = empty_conditioning(backbone)["prompt_embeds"].shape[1]
        assert tokens == backbone.prompt_tokens() == known_models()[path].tokens


def test_the_shapes_are_those_of_a_loaded_model(sd15_dir: Path, sdxl_dir: Path, sd3_dir: Path, flux_dir: Path) -> None:
    from diffalign.pipelines import load_backbone

    for folder in (sd15_dir, sdxl_dir, sd3_dir, flux_dir):
        backbone = load_backbone(folder)
        real = backbone.encode_prompts(["a"])
        assert {k: v.shape for k, v in empty_conditioning(backbone).items()} == {k: v.shape for k, v in real.items()}


def test_every_recipe_for_a_hub_model_has_its_sizes_here() -> None:
    for recipe in list_recipes():
        config: Any = load(kind_of(recipe.name), recipe.name)
        if kind_of(recipe.name) in ("train", "distill", "reward-gradient") and not config.model.path.startswith(
            "shapes"
        ):
            assert config.model.path in known_models(), recipe.name


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    write_images(tmp_path / "pairs")
    write_groups(tmp_path / "pairs", group_rows())
    return tmp_path / "pairs"


@pytest.mark.parametrize(
    ("recipe", "trainable", "size", "said"),
    [
        ("sd15_dpo", 859_520_964, "about 4.3 GB", "hf download stable-diffusion-v1-5/stable-diffusion-v1-5"),
        (
            "sd35_medium_dpo",
            None,
            "about 11.7 GB",
            "accept them at https://huggingface.co/stabilityai/stable-diffusion-3.5",
        ),
    ],
)
def test_a_dry_run_needs_no_network(
    recipe: str,
    trainable: int | None,
    size: str,
    said: str,
    pairs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With HF_HUB_OFFLINE set, as in all tests; a small resolution and fewer layers, so that the step of shapes is quick."""
    for path, model in known_models().items():
        if "num_layers" in model.trunk:
            fewer = model.trunk | {"num_layers": 2, "dual_attention_layers": [0]}
            monkeypatch.setitem(known_models(), path, dataclasses.replace(model, trunk=fewer))
    more = ["optimizer.name=adamw", "data.resolution=64", "train.micro_batch=1", "tracking.trackers=[]"]
    assert run("train", recipe, f"data.path={pairs}", *more, "--dry-run") == 0
    out = capsys.readouterr().out
    assert size in out and said in out and "peak: " in out and "the hub gave no answer" in out
    assert "time: unknown" in out and "warning: no validation" in out and "far from the model's own" in out
    assert "enlarged" in out and " epochs: the same groups again and again" in out
    numbers = int(out.split("#   trainable: ")[1].split("\n")[0].replace(",", ""))
    assert numbers == trainable if trainable else numbers > 100_000


@pytest.mark.parametrize("recipe", ["sdxl_dmd2_4step", "sdxl_refl"])
def test_so_do_the_other_trainers(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    more = ["rewards=[sharpness]"] if recipe == "sdxl_refl" else []
    verb = kind_of(recipe)
    assert run(verb, recipe, f"prompts={tmp_path / 'p.txt'}", *more, "optimizer=adamw", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "parameters: 2567463684" in out and "trainable: 0" not in out and "hf download stabilityai/" in out


def test_a_model_that_is_not_known_and_not_here(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "sdxl_dpo", "model=somebody/realism", f"data.path={pairs}", "optimizer=adamw", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "not predicted: the model is not on this machine" in out and "hf download somebody/realism" in out
    # A mistyped folder is no hub id.
    assert run("train", "sdxl_dpo", "model=./nothing", f"data.path={pairs}", "optimizer=adamw", "--dry-run") == 2
