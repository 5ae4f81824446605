"""Families whose prompts have their own lengths: what every family must show, on tiny checkpoints in the published layout.

Drawing as plain diffusers draws, a margin of 0, training with exact resume, caches, export, features, few steps.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.training_source import prepare_source
from diffalign.data.writer import write_groups
from diffalign.errors import DiffalignError
from diffalign.pipelines import load_backbone
from diffalign.pipelines.adapters import POLICY, save_adapter
from diffalign.pipelines.export import export_kohya, export_merged
from diffalign.pipelines.features import predict_with_features
from diffalign.pipelines.few_step import few_step, student_scheduler
from diffalign.pipelines.lora_file import LORA_FILE
from helpers import tiny_qwen, toy
from helpers.lora_readers import PROGRAMS, Model, largest_difference
from helpers.small_datasets import LABELS, group_rows, quiet, settings, write_images
from helpers.tiny_training import Source, config_for
from helpers.trunks import with_adapters

FAMILIES = ("z_image", "qwen_image", "qwen_image_21")
PROMPTS, SEEDS, SIZE = ["a red circle", "Zwei blaue Quadrate, 二"], [3, 4], {"height": 64, "width": 96}


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"{request.param}_dir")
    return path


def drawn(backbone: Any, pipeline: Any, scale: float, **options: Any) -> list[Any]:
    """What users of the plain pipeline get, prompt by prompt."""
    pipeline.set_progress_bar_config(disable=True)
    negatives = backbone.negative_prompts(None, 1)
    negative = {} if negatives is None or scale <= 1 else {"negative_prompt": negatives}
    options = {**SIZE, **backbone.guidance_arguments(scale), **negative, **options}
    found = []
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        generator = torch.Generator().manual_seed(seed)
        found.append(pipeline([prompt], generator=generator, num_inference_steps=3, **options).images[0])
    return found


def noise(backbone: Any, height: int = 64, width: int = 96) -> Tensor:
    cell = backbone.vae_scale_factor
    shape = (1, backbone.latent_channels, height // cell, width // cell)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in SEEDS])


def as_rgb(image: Any) -> np.ndarray:
    return np.asarray(image.convert("RGB"), np.int16)  # Qwen-Image-2.1 draws with opacity


def test_drawing_is_the_pipelines_own(folder: Path) -> None:
    """Prompts of two lengths in one batch: a loop of our steps, samples, and samples from embeddings."""
    backbone: Any = load_backbone(folder)
    latents = torch.stack(drawn(backbone, backbone.pipeline, 1.0, output_type="latent"))
    side = backbone.vae_scale_factor
    expected = backbone.from_pipeline(latents, 64 // side, 96 // side)
    x, conditioning = noise(backbone), backbone.encode_prompts(PROMPTS)
    with torch.no_grad():
        for t, t_next in pairwise(backbone.sampling_times(3, 64, 96)):
            prediction = backbone.predict(x, t.repeat(2), conditioning)
            x = backbone.process.step(x, prediction, t.repeat(2), t_next.repeat(2))
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=0)
    guided = drawn(backbone, backbone.pipeline, 4.0)
    ours = backbone.sample(PROMPTS, SEEDS, steps=3, guidance_scale=4.0, **SIZE)
    encoded = backbone.encode_guided(PROMPTS)
    assert {n.removeprefix("negative_") for n in encoded if n.startswith("negative_")} == set(backbone.conditioning)
    again = backbone.sample_encoded(encoded, SEEDS, steps=3, guidance_scale=4.0, **SIZE)
    for one, two, three in zip(guided, ours, again, strict=True):
        assert three.size == (96, 64) and three.mode == "RGB"
        assert np.abs(as_rgb(one) - as_rgb(two)).max() <= 1 and np.abs(as_rgb(two) - as_rgb(three)).max() <= 1


def test_a_prompt_is_predicted_alike_in_any_company(folder: Path) -> None:
    """Also its features, from which the prompt's tokens are left out; embeddings have one shape, stated beforehand."""
    backbone: Any = load_backbone(folder)
    both, alone = backbone.encode_prompts(PROMPTS), backbone.encode_prompts(PROMPTS[:1])
    assert {name: tuple(value.shape[1:]) for name, value in alone.items()} == backbone.conditioning_shapes()
    x, t = noise(backbone), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        together, features = predict_with_features(backbone, x, t, both)
        single, own = predict_with_features(backbone, x[:1], t[:1], alone)
    torch.testing.assert_close(together[:1], single, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(features[:1], own, atol=1e-5, rtol=1e-4)
    assert own.shape[1] == backbone.tokens(64, 96)
    lengths = both[backbone.prompt_masks[0]].sum(dim=1)
    assert 0 < lengths[0] < lengths[1] < backbone.prompt_tokens() and backbone.longest < backbone.prompt_tokens()


def test_shapes_take_the_operations_of_numbers(folder: Path) -> None:
    """On the meta device, where memory is predicted, no length can be read from a mask: all tokens count."""
    found = []
    for device in ("cpu", "meta"):
        backbone: Any = load_backbone(folder)
        conditioning = {
            name: torch.ones(1, *shape, device=device) for name, shape in backbone.conditioning_shapes().items()
        }
        backbone.trunk.to(device)
        backbone.device = torch.device(device)
        # The counter does not know the CPU's fused attention.
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            x = noise(backbone)[:1].to(device)
            assert backbone.predict(x, torch.full((1,), 0.5, device=device), conditioning).shape == x.shape
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0


def test_images_go_through_the_vae(folder: Path) -> None:
    backbone: Any = load_backbone(folder)
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    latents, spread = backbone.encode_posterior(pixels)
    assert latents.shape == noise(backbone).shape == spread.shape and (spread > 0).all()
    leaf = latents.clone().requires_grad_()
    image = backbone.decode_latents(leaf)
    image.mean().backward()
    assert image.shape == pixels.shape and leaf.grad is not None and bool(leaf.grad.abs().sum() > 0)


def train(folder: Path, run_dir: Path, steps: int, objective: dict[str, Any]) -> list[dict[str, float]]:
    backbone = load_backbone(folder)
    config = config_for(folder, run_dir, steps, optimizer={"lr": 1e-2}, checkpoint={"every": 1})
    config = type(config).model_validate({**config.model_dump(mode="json"), "objective": objective})
    toy.train(config, backbone=backbone, source=Source(backbone), say=quiet)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", [{"name": "dpo"}, {"name": "gdro", "beta": 200.0, "tau": 0.05, "gamma": 0.5}])
def test_training_starts_at_the_reference_and_resumes_exactly(
    folder: Path, objective: dict[str, Any], tmp_path: Path
) -> None:
    rows = train(folder, tmp_path / "straight", 2, objective)
    assert rows[0]["margin"] == 0.0 == rows[0]["drift"] and rows[0]["grad_norm"] > 0 and rows[1]["drift"] > 0
    if objective["name"] == "gdro":
        train(folder, tmp_path / "resumed", 1, objective)
        assert train(folder, tmp_path / "resumed", 2, objective) == rows
        one, two = (load_file(tmp_path / name / "weights" / LORA_FILE) for name in ("straight", "resumed"))
        assert all(torch.equal(one[name], value) for name, value in two.items())


def test_cached_and_live_latents_and_prompts_agree(folder: Path, tmp_path: Path) -> None:
    write_images(tmp_path)
    write_groups(tmp_path, group_rows())
    backbone, dataset = load_backbone(folder), PreferenceDataset(tmp_path)
    cached, live = (
        prepare_source(settings(cache=mode, resolution=64), LABELS, dataset, backbone, quiet).batch([0, 2])
        for mode in ("all", "off")
    )
    assert torch.equal(cached.latents, live.latents)
    for name, value in cached.conditioning.items():
        assert torch.equal(value, live.conditioning[name]), name


def test_exports_draw_the_trained_image(folder: Path, tmp_path: Path) -> None:
    """A LoRA in plain diffusers, the merged pipeline, and one line for the layout that does not exist."""
    backbone: Any = load_backbone(folder)
    backbone.add_lora(2, 8.0)
    generator = torch.Generator().manual_seed(1)
    for parameter in backbone.trainable().values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    tuned = [as_rgb(image) for image in backbone.sample(PROMPTS, SEEDS, steps=3, guidance_scale=3.0, **SIZE)]
    with backbone.role("reference"):
        base = [as_rgb(image) for image in backbone.sample(PROMPTS, SEEDS, steps=3, guidance_scale=3.0, **SIZE)]
    assert np.abs(tuned[0] - base[0]).max() > 10
    backbone.save_weights(tmp_path / "lora")
    plain = DiffusionPipeline.from_pretrained(folder)
    plain.load_lora_weights(tmp_path / "lora")
    for image, wanted in zip(drawn(backbone, plain, 3.0), tuned, strict=True):
        assert np.abs(as_rgb(image) - wanted).max() <= 1
    with pytest.raises(DiffalignError, match="that layout is not known for"):
        export_kohya(tmp_path / "lora", type(backbone), {}, tmp_path)
    export_merged(backbone, tmp_path / "merged")
    for image, wanted in zip(
        drawn(backbone, DiffusionPipeline.from_pretrained(tmp_path / "merged"), 3.0), tuned, strict=True
    ):
        assert np.abs(as_rgb(image) - wanted).max() <= 1


@pytest.mark.parametrize("targets", ["attention", "every layer of the blocks"])
def test_comfyui_reads_the_lora(folder: Path, targets: str, tmp_path: Path) -> None:
    """As ComfyUI reads it, which fuses queries, keys and values of Z-Image, and gate and input of Qwen-Image-2.1."""
    backbone: Any = load_backbone(folder)
    trunk = backbone.trunk
    names = list(backbone.lora_targets)
    if targets != "attention":
        inside = [n for n, m in trunk.named_modules() if isinstance(m, torch.nn.Linear)]
        names = [n for n in inside if n.startswith(f"{backbone.block_list}.")]
    shapes = {key: tuple(value.shape) for key, value in trunk.state_dict().items()}
    model = Model(backbone.family, dict(trunk.config), shapes)
    true = model.true_changes(with_adapters(trunk, 3, 6.0, names))
    save_adapter(trunk, backbone.trunk_name, POLICY, tmp_path)
    found = PROGRAMS["ComfyUI"](tmp_path / LORA_FILE, model)
    assert not found.unread and true and largest_difference(found.changes, true) < 1e-6


@pytest.mark.parametrize("steps", [4, 3])
def test_a_few_step_student_draws_as_training_rolls_out(folder: Path, steps: int, tmp_path: Path) -> None:
    """From the saved folder, given nothing but the number of steps; times are even with the shift applied once."""
    backbone: Any = load_backbone(folder)
    shift = backbone.shift_at(steps, 64, 96)
    grid: Any = backbone.schedule_arguments(steps, 64, 96)["sigmas"]
    scheduler = student_scheduler(backbone.pipeline.scheduler, steps, "euler", shift=shift, even=True)
    student = few_step(backbone.process, scheduler, steps, "euler", 1.0, None, grid)
    even = torch.linspace(1.0, 1.0 / steps, steps)
    expected = shift * even / (1 + (shift - 1) * even)
    torch.testing.assert_close(student.times, torch.cat([expected, torch.zeros(1)]), atol=1e-6, rtol=0)
    scheduler.save_pretrained(tmp_path / "scheduler")
    backbone.pipeline.scheduler = type(scheduler).from_pretrained(tmp_path / "scheduler")
    arguments = {**SIZE, **backbone.guidance_arguments(0.0), "num_inference_steps": steps, "output_type": "latent"}
    found = backbone.pipeline([PROMPTS[0]], generator=torch.Generator().manual_seed(SEEDS[0]), **arguments).images
    x, side = noise(backbone)[:1], backbone.vae_scale_factor
    with torch.no_grad():
        for index in range(steps):
            x = student.advance(
                x, backbone.predict(x, student.at(index, x), backbone.encode_prompts(PROMPTS[:1])), index, None
            )
    torch.testing.assert_close(x, backbone.from_pipeline(found, 64 // side, 96 // side), atol=1e-4, rtol=0)


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match=r"model\.attention: flash is not possible with .*; use sdpa"):
        load_backbone(folder, attention="flash")
    backbone: Any = load_backbone(folder)
    multiple = backbone.pixel_multiple
    with pytest.raises(DiffalignError, match=f"multiples of {multiple}"):
        backbone.encode_images(torch.zeros(1, 3, 64, 64 + multiple // 2))
    with pytest.raises(DiffalignError, match="this is a rectified-flow model"):
        backbone.use_scheduler("ddim", {})


def test_distilled_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match="guidance embedding is not supported"):
        load_backbone(tiny_qwen.qwen_image(tmp_path / "guided", guidance_embeds=True))
    turbo = tiny_qwen.qwen_image_21(tmp_path / "turbo", sample_sigmas=[1.0, 0.5])
    with pytest.raises(DiffalignError, match=r"distilled to a few steps \(Turbo\) and cannot be trained"):
        load_backbone(turbo)
