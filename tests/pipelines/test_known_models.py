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

# The number of weights of each trunk, as the published checkpoints have it, channels of its latents, side, pixels of a cell.
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (859_520_964, 4, 512, 8),
    "stabilityai/stable-diffusion-xl-base-1.0": (2_567_463_684, 4, 1024, 8),
    "stabilityai/stable-diffusion-3-medium-diffusers": (2_028_328_000, 16, 1024, 8),
    "stabilityai/stable-diffusion-3.5-medium": (2_243_171_520, 16, 1024, 8),
    "stabilityai/stable-diffusion-3.5-large": (8_056_627_520, 16, 1024, 8),
    "black-forest-labs/FLUX.1-dev": (11_901_408_320, 16, 1024, 8),
    "black-forest-labs/FLUX.2-klein-base-4B": (3_875_544_576, 128, 1024, 16),
    "black-forest-labs/FLUX.2-klein-4B": (3_875_544_576, 128, 1024, 16),
    "black-forest-labs/FLUX.2-klein-base-9B": (9_078_581_248, 128, 1024, 16),
    "black-forest-labs/FLUX.2-klein-9B": (9_078_581_248, 128, 1024, 16),
    "black-forest-labs/FLUX.2-dev": (32_223_281_152, 128, 1024, 16),
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": (1_604_462_752, 32, 1024, 32),
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": (1_604_641_952, 32, 1024, 32),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": (610_856_096, 4, 1024, 8),
    "Tongyi-MAI/Z-Image": (6_154_908_736, 16, 1024, 8),
    "Qwen/Qwen-Image-2512": (20_430_401_088, 16, 1024, 8),
    "Qwen/Qwen-Image-2.1": (7_115_124_736, 64, 1024, 16),
}
GATED = ("black-forest-labs/FLUX.1", "black-forest-labs/FLUX.2-dev", "-9B", "diffusion-3")
# Of single files in bfloat16 as their repositories list them. A header of some kilobytes names the tensors.
FILE_BYTES = {
    "black-forest-labs/FLUX.2-klein-base-4B": 7_751_105_712,
    "black-forest-labs/FLUX.2-klein-base-9B": 18_157_185_168,
}


def test_each_has_the_published_size() -> None:
    assert set(known_models()) == set(PUBLISHED)
    for path, (weights, channels, side, cell) in PUBLISHED.items():
        backbone = known_backbone(path, dtype=torch.bfloat16)
        assert backbone.facts()["parameters"] == weights, path
        sizes = backbone.latent_channels, backbone.default_resolution, backbone.vae_scale_factor
        assert sizes == (channels, side, cell), path
        gated = any(part in path for part in GATED)
        assert (known_models()[path].terms == f"https://huggingface.co/{path}") == gated
        backbone.add_lora(4, 4.0)
        assert sum(p.numel() for p in backbone.trainable().values()) > 100_000
        tokens = empty_conditioning(backbone)["prompt_embeds"].shape[1]
        assert tokens == backbone.prompt_tokens() == known_models()[path].tokens


def test_published_files_have_that_size() -> None:
    for path, size in FILE_BYTES.items():
        assert 0 < size - 2 * PUBLISHED[path][0] < 100_000, path


def mmdit2(double: int, single: int, width: int, text: int) -> int:
    """FLUX.2: 13 width^2 multiplications a token and block, attention over image and text, embeddings, modulations."""
    image, prompt = 64 * 64, 512
    tokens = image + prompt
    blocks = (double + single) * (13 * width**2 * tokens + 2 * tokens**2 * width)
    return blocks + (2 * image * 128 + prompt * text) * width + (18 * width + 256) * width


def pixart(width: int = 1152, depth: int = 28, text: int = 4096) -> int:
    image, prompt = 64 * 64, 300
    block = 14 * width**2 * image + 2 * width**2 * prompt + 2 * image * (image + prompt) * width
    ends = image * (4 * 4 + 4 * 8) * width + prompt * (text + width) * width
    return depth * block + ends + (256 + width + 6 * width) * width


def sana(width: int = 2240, depth: int = 20, text: int = 2304) -> int:
    """Linear attention over 70 heads of 32; the feed-forward is a 1 x 1, a 3 x 3 depthwise and a 1 x 1 convolution."""
    image, prompt, hidden = 32 * 32, 300, 5600
    dense = (6 * width**2 + 3 * width * hidden + 9 * 2 * hidden) * image + 2 * width**2 * prompt
    block = dense + 2 * image * prompt * width + 2 * 70 * 33 * 32 * image
    return depth * block + 2 * image * 32 * width + prompt * (text + width) * width + (256 + 7 * width) * width


def z_image(width: int = 3840, layers: int = 30, text: int = 2560) -> int:
    """A block has 4 width^2 in its attention, three of width x 8/3 width behind it, and a modulation of 256 values."""
    image, prompt, hidden = 64 * 64, 512, 10240

    def block(tokens: int, modulated: bool = True) -> int:
        return (4 * width**2 + 3 * width * hidden) * tokens + 2 * tokens**2 * width + modulated * 4 * 256 * width

    blocks = 2 * block(image) + 2 * block(prompt, False) + layers * block(image + prompt)
    ends = (image * 64 + prompt * text + 256 + (image + prompt) * 64) * width
    return blocks + ends + 256 * 1024 + 1024 * 256


def qwen_image(width: int = 3072, depth: int = 60, text: int = 3584) -> int:
    """12 width^2 a token and block in either stream, attention over both, and two modulations of 6 width^2."""
    image, prompt = 64 * 64, 512
    tokens = image + prompt
    blocks = depth * (12 * width**2 * tokens + 2 * tokens**2 * width + 12 * width**2)
    return blocks + (2 * image * 64 + prompt * text + 256) * width + 3 * width**2


def qwen_image_21(width: int = 4096, depth: int = 32, text: int = 4096) -> int:
    """13 width^2 a token and block; the prompt attends to itself, the image to all; one modulation at two times."""
    image, prompt = 64 * 64, 512
    tokens = image + prompt
    blocks = depth * (13 * width**2 * tokens + 2 * (prompt**2 + image * tokens) * width)
    ends = (image * 64 + prompt * (text + width) + tokens * 64) * width
    return blocks + ends + 2 * (256 * width + 6 * width**2)


@pytest.mark.parametrize(
    ("path", "multiplications"),
    [
        ("Tongyi-MAI/Z-Image", z_image()),
        ("Qwen/Qwen-Image-2512", qwen_image()),
        ("Qwen/Qwen-Image-2.1", qwen_image_21()),
        ("black-forest-labs/FLUX.2-klein-base-4B", mmdit2(5, 20, 3072, 7680)),
        ("black-forest-labs/FLUX.2-klein-base-9B", mmdit2(8, 24, 4096, 12288)),
        ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", pixart()),
        ("Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", sana()),
    ],
)
def test_a_pass_takes_the_operations_that_the_sizes_imply(path: str, multiplications: int) -> None:
    """One image of 1024 pixels: two operations a multiplication."""
    from torch.utils.flop_counter import FlopCounterMode

    backbone = known_backbone(path, dtype=torch.bfloat16)
    backbone.device = torch.device("meta")
    cells = 1024 // backbone.vae_scale_factor
    noisy = torch.empty(1, backbone.latent_channels, cells, cells, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.predict(noisy, torch.empty(1, device="meta"), empty_conditioning(backbone))
    assert counter.get_total_flops() == pytest.approx(2 * multiplications, rel=1e-4)


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
