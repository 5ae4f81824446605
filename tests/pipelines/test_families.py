"""FLUX.2 klein, Sana and PixArt-Sigma on tiny random checkpoints in the published layout, against diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.prompts import PromptRow
from diffalign.data.training_source import prepare_source
from diffalign.data.writer import write_groups
from diffalign.errors import DiffalignError
from diffalign.pipelines import Backbone, load_backbone
from diffalign.pipelines.export import export_kohya, export_merged, export_peft, single_file
from diffalign.pipelines.features import predict_with_features
from diffalign.pipelines.few_step import few_step, student_scheduler
from diffalign.pipelines.kohya import KOHYA_FILE
from diffalign.training.device import start_accelerator
from diffalign.training.prompt_source import PromptSource
from diffalign.training.reward_gradient.method import RewardGradient
from diffalign.training.reward_gradient.step import UnrolledSampler
from diffalign.training.run import run
from helpers import toy, toy_reward_gradient
from helpers.files import rows
from helpers.small_datasets import LABELS, group_rows, quiet, settings, write_images

PROMPTS, SEEDS = ["a red circle", "Zwei blaue Quadrate, 二"], [3, 4]
SIZE = {"height": 64, "width": 96}


@dataclass(frozen=True)
class Case:
    """A family: its options, a sampler that training can unroll, pixels of a cell, and options that save time."""

    options: dict[str, Any]
    sampler: tuple[str, dict[str, Any]] | None = None
    cells: int = 8
    fast: dict[str, Any] = field(default_factory=dict)


CASES = {
    "flux2_klein": Case({"max_sequence_length": 40}, cells=16),
    "sana": Case({"max_sequence_length": 24}, ("flow_euler", {}), fast={"instruction": False}),
    "pixart": Case({"max_sequence_length": 12}, ("ddim", {})),
}


@pytest.fixture(params=CASES)
def family(request: pytest.FixtureRequest) -> tuple[str, Callable[..., Backbone]]:
    """A family's name, and a function that loads it: with its own sampler, or with one that training can unroll."""
    case, folder = CASES[request.param], request.getfixturevalue(f"{request.param}_dir")

    def load(unrolled: bool = False, **options: Any) -> Backbone:
        backbone = load_backbone(folder, **{**case.options, **options})
        if unrolled and case.sampler is not None:
            backbone.use_scheduler(*case.sampler)
        return backbone

    return request.param, load


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def plain(backbone: Any, **options: Any) -> Any:
    """What the pipeline gives its users."""
    given = {"num_inference_steps": 3, "guidance_scale": 4.0, **SIZE, **backbone.sampling_options(), **options}
    return backbone.pipeline(prompt=PROMPTS, generator=generators(), **given).images


def noise(backbone: Backbone) -> Tensor:
    cells = backbone.vae_scale_factor
    shape = (1, backbone.latent_channels, SIZE["height"] // cells, SIZE["width"] // cells)
    return backbone.process.initial(torch.cat([torch.randn(shape, generator=g) for g in generators()]))


def as_latents(backbone: Backbone, found: Tensor) -> Tensor:
    cells = backbone.vae_scale_factor
    return backbone.from_pipeline(found, SIZE["height"] // cells, SIZE["width"] // cells)


def near(found: list[Any], expected: list[Any]) -> bool:
    """Whether no pixel differs by more than one level of 256."""
    return (
        max(int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) for a, b in zip(found, expected, strict=True))
        <= 1
    )


def test_a_loop_of_steps_is_the_pipeline(family: tuple[str, Any]) -> None:
    name, load = family
    backbone = load(unrolled=True)
    assert backbone.family == name and backbone.vae_scale_factor == CASES[name].cells
    conditioning = backbone.encode_prompts(PROMPTS)
    expected = as_latents(backbone, plain(backbone, guidance_scale=1.0, num_inference_steps=4, output_type="latent"))
    x, steps = noise(backbone), backbone.sampler_steps(4, **SIZE)
    with torch.no_grad():
        for t, stop in zip(steps.times, steps.stops, strict=True):
            x = backbone.process.step(x, backbone.predict(x, t.repeat(2), conditioning), t.repeat(2), stop.repeat(2))
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(x, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_images_are_the_pipelines_own(family: tuple[str, Any]) -> None:
    """With the sampler that the checkpoint ships, guided; also from prompts encoded before, and unrolled as training does."""
    name, load = family
    backbone = load()
    drawn, expected = backbone.sample(PROMPTS, SEEDS, steps=3, guidance_scale=4.0, **SIZE), plain(backbone)
    # FLUX.2's pipelines return latents as its VAE has them, and normalising them again rounds.
    assert near(drawn, expected) and drawn[0].size == (96, 64)
    assert name == "flux2_klein" or [i.tobytes() for i in drawn] == [i.tobytes() for i in expected]
    encoded = backbone.encode_guided(PROMPTS)
    assert {f"negative_{n}" for n in backbone.conditioning} | set(backbone.conditioning) == set(encoded)
    again = backbone.sample_encoded(encoded, SEEDS, steps=3, guidance_scale=4.0, **SIZE)
    assert near(again, drawn)

    backbone = load(unrolled=True)
    source = PromptSource(backbone, [PromptRow(text) for text in PROMPTS], cache=True)
    empty = {key: value.expand(2, *value.shape[1:]) for key, value in source.unconditional.items()}
    sampler = UnrolledSampler(backbone, backbone.sampling_times(3, **SIZE), source.batch([0, 1]), empty, 4.0,
                              backbone.sampler_steps(3, **SIZE).stops)  # fmt: skip
    expected = as_latents(backbone, plain(backbone, output_type="latent"))
    rolled = sampler.roll(noise(backbone), 3)
    torch.testing.assert_close(rolled, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_latents_are_the_pipelines_own(family: tuple[str, Any]) -> None:
    name, load = family
    backbone = load()
    pipeline: Any = backbone.pipeline
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if name == "flux2_klein":
            expected = pipeline._encode_vae_image(2 * pixels - 1, None)
        elif name == "sana":
            expected = pipeline.vae.encode(2 * pixels - 1).latent * pipeline.vae.config.scaling_factor
        else:
            expected = pipeline.vae.encode(2 * pixels - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
    latents, spread = backbone.encode_posterior(pixels)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    assert spread.shape == latents.shape == (2, backbone.latent_channels, *(s // CASES[name].cells for s in (64, 96)))
    assert bool(spread.any()) == (name != "sana")
    # Decoding is what the pipeline does behind its last step, and lets a gradient through.
    kept = as_latents(backbone, plain(backbone, output_type="latent")).requires_grad_()
    decoded = backbone.decode_latents(kept)
    images = backbone.to_images(decoded)
    assert near(images, plain(backbone))
    decoded.mean().backward()
    assert kept.grad is not None and float(kept.grad.abs().sum()) > 0


def dataset(folder: Path) -> PreferenceDataset:
    write_groups(folder, group_rows())
    write_images(folder)
    return PreferenceDataset(folder)


@pytest.mark.parametrize("objective", [{"name": "dpo", "beta": 200.0}, {"name": "gdro", "beta": 50.0}])
def test_training(family: tuple[str, Any], objective: dict[str, Any], tmp_path: Path) -> None:
    """Two steps from a margin of 0, alike with what is cached and what is not, and after a stop between them."""
    name, load = family
    data, logs = dataset(tmp_path / "data"), {}
    given: dict[str, Any] = {
        "tune": {"rank": 2, "alpha": 4}, "objective": objective, "optimizer": {"lr": 1e-2}, "checkpoint": {"every": 1},
        "data": {"path": str(tmp_path / "data")},
    }  # fmt: skip
    ways: dict[str, tuple[int, ...]] = {"all": (2,), "off": (2,), "latents": (1, 2)}
    for mode, parts in ways.items() if objective["name"] == "dpo" else [("all", (2,))]:
        for steps in parts:
            backbone = load(**CASES[name].fast)
            source = prepare_source(settings(cache=mode, resolution=64), LABELS, data, backbone, quiet)
            train = {"steps": steps, "groups_per_step": 2, "micro_batch": 2, "threads": 1}
            config = toy.toy_config(tmp_path / mode, train=train, **given)
            toy.train(config, backbone=backbone, source=source, say=quiet)
        logs[mode] = rows(tmp_path / mode)
    assert all(log == logs["all"] for log in logs.values())
    first, last = logs["all"]
    assert first["margin"] == 0.0 and first["drift"] == 0.0 and first["grad_norm"] > 0 and last["drift"] > 0


def test_two_steps_along_a_rewards_gradient(family: tuple[str, Any], tmp_path: Path) -> None:
    """Through the sampler's last steps and the decoder, guided; the drift starts at 0."""
    name, load = family
    backbone = load(unrolled=True, **CASES[name].fast)

    def bright(latents: Tensor, indices: list[int]) -> dict[str, Tensor]:
        return {"bright": backbone.decode_latents(latents).flatten(1).mean(dim=1)}

    config = toy_reward_gradient.toy_config(
        tmp_path / "run", sampler={"steps": 3}, train={"steps": 2, "images_per_step": 2, "micro_batch": 2},
        tune={"rank": 2, "alpha": 2}, method={"name": "draft", "last": 2}, drift={"weight": 0.1},
    )  # fmt: skip
    source = PromptSource(backbone, [PromptRow(text) for text in PROMPTS], cache=True)
    cells = 64 // backbone.vae_scale_factor
    shape = (backbone.latent_channels, cells, cells)
    method: Any = RewardGradient(config, backbone, source, shape, bright, start_accelerator(config))
    run(config, method, say=quiet)
    first, last = rows(tmp_path / "run")
    assert first["drift"] == 0.0 and first["grad_norm"] > 0 and last["drift"] > 0


def moved(backbone: Backbone) -> None:
    """Give the policy weights that matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.trainable().values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def test_a_saved_lora_draws_the_same_in_plain_diffusers(family: tuple[str, Any], tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    name, load = family
    backbone = load(**CASES[name].fast)
    base = backbone.sample(PROMPTS, SEEDS, steps=3, guidance_scale=4.0, **SIZE)[0]
    backbone.add_lora(2, 8.0)
    moved(backbone)
    tuned = backbone.sample(PROMPTS, SEEDS, steps=3, guidance_scale=4.0, **SIZE)[0]
    with backbone.role("reference"):
        assert backbone.sample(PROMPTS, SEEDS, steps=3, guidance_scale=4.0, **SIZE)[0].tobytes() == base.tobytes()
    backbone.save_weights(tmp_path / "w")
    pipeline: Any = DiffusionPipeline.from_pretrained(backbone.path)
    pipeline.set_progress_bar_config(disable=True)
    if backbone.lora_loader:
        pipeline.load_lora_weights(tmp_path / "w")
        given = {"num_inference_steps": 3, "guidance_scale": 4.0, **SIZE, **backbone.sampling_options()}
        image = pipeline(prompt=PROMPTS, generator=generators(), **given).images[0]
        assert near([image], [tuned])
    again = load(**CASES[name].fast)
    again.load_weights(tmp_path / "w")
    assert near([again.sample(PROMPTS, SEEDS, steps=3, guidance_scale=4.0, **SIZE)[0]], [tuned])
    assert not near([base], [tuned])


def test_exports_are_read_by_others(family: tuple[str, Any], tmp_path: Path) -> None:
    """kohya's names and one file by diffusers' own converters, peft's folder by peft, and the merged pipeline."""
    from diffusers import DiffusionPipeline, Flux2Transformer2DModel
    from peft import PeftModel

    name, load = family
    backbone = load(**CASES[name].fast)
    backbone.add_lora(2, 4.0)
    moved(backbone)
    config: Any = backbone.trunk.config
    tuned = plain(backbone)
    backbone.save_weights(tmp_path / "w")
    fresh: Any = DiffusionPipeline.from_pretrained(backbone.path)
    fresh.set_progress_bar_config(disable=True)
    if backbone.kohya is not None:
        (tmp_path / "kohya").mkdir()
        export_kohya(tmp_path / "w", type(backbone), dict(config), tmp_path / "kohya")
        fresh.load_lora_weights(tmp_path / "kohya", weight_name=KOHYA_FILE)
    else:
        export_peft(tmp_path / "w", tmp_path / "peft")
        fresh.transformer = PeftModel.from_pretrained(fresh.transformer, tmp_path / "peft")
        again = load(**CASES[name].fast)
        again.load_weights(tmp_path / "peft")
        assert near(plain(again), tuned)
    given = {"num_inference_steps": 3, "guidance_scale": 4.0, **SIZE, **backbone.sampling_options()}
    assert near(fresh(prompt=PROMPTS, generator=generators(), **given).images, tuned)
    export_merged(backbone, tmp_path / "merged")
    merged: Any = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    merged.set_progress_bar_config(disable=True)
    assert near(merged(prompt=PROMPTS, generator=generators(), **given).images, tuned)
    if backbone.single_file is not None:
        save_file(single_file(backbone), tmp_path / "one.safetensors")
        read = Flux2Transformer2DModel.from_single_file(
            str(tmp_path / "one.safetensors"), config=backbone.path, subfolder="transformer", local_files_only=True
        )
        state = merged.transformer.state_dict()
        assert state.keys() == read.state_dict().keys()
        assert all(torch.equal(value, state[key]) for key, value in read.state_dict().items())


def test_a_few_step_student_is_saved_with_its_times(family: tuple[str, Any]) -> None:
    """Distillation: the middle block's features of the image alone, and the pipeline visits the student's times."""
    name, load = family
    backbone: Any = load(**CASES[name].fast)
    conditioning = backbone.encode_prompts(PROMPTS)
    noisy, t = noise(backbone), torch.full((2,), 0.5 * backbone.process.span)
    prediction, features = predict_with_features(backbone, noisy, t, conditioning)
    assert prediction.shape == noisy.shape and features.shape[0] == 2
    cells = noisy.shape[-2] * noisy.shape[-1]
    assert features.shape[1] * (4 if name == "pixart" else 1) == cells
    grid = backbone.schedule_arguments(4, **SIZE).get("sigmas")
    shift = backbone.shift_at(4, **SIZE)
    scheduler = student_scheduler(backbone.pipeline.scheduler, 4, "euler", shift=shift, even=grid is not None)
    student = few_step(backbone.process, scheduler, 4, "euler", 0.0, None, grid)
    backbone.pipeline.scheduler = scheduler
    plain(backbone, num_inference_steps=4, guidance_scale=0.0, output_type="latent")
    scale = 1000 if backbone.process.span == 1.0 else 1
    torch.testing.assert_close(scale * student.times[:-1], scheduler.timesteps.float(), atol=1e-3, rtol=0)
    assert float(student.times[1]) > 0.75 * backbone.process.span or name == "pixart"


def test_facts_need_no_encoders(family: tuple[str, Any]) -> None:
    _, load = family
    backbone = load()
    shapes = {key: tuple(value.shape[1:]) for key, value in backbone.encode_prompts(["a"]).items()}
    assert backbone.conditioning_shapes() == shapes and backbone.count_cut(["a" * 400, "a"]) == 1
    assert type(backbone.middle_block()).__name__ in backbone.blocks


# --- FLUX.2 ------------------------------------------------------------------------------------------------------------


def test_shifts_of_flux2_are_those_of_the_pipeline(flux2_klein_dir: Path) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    backbone: Any = load_backbone(flux2_klein_dir, **CASES["flux2_klein"].options)
    for side, steps in ((512, 50), (1024, 4), (1024, 28), (1536, 28)):
        mu = compute_empirical_mu((side // 16) ** 2, steps)
        assert backbone.shift_at(steps, side, side) == pytest.approx(np.exp(mu), rel=1e-6)
    times = backbone.sampling_times(6, 1024, 1024)
    torch.testing.assert_close(times, backbone.process.schedule(6), atol=1e-6, rtol=0)
    assert all(now > then for now, then in pairwise(times.tolist()))


def test_a_distilled_klein_ignores_guidance(tmp_path: Path) -> None:
    from helpers import tiny

    backbone = load_backbone(tiny.flux2_klein(tmp_path, is_distilled=True), max_sequence_length=40)
    assert backbone.guided and backbone.guidance is None and set(backbone.encode_guided(PROMPTS)) == {"prompt_embeds"}
    one, four = (
        backbone.sample(PROMPTS, SEEDS, steps=2, guidance_scale=scale, **SIZE)[0].tobytes() for scale in (1.0, 4.0)
    )
    assert one == four
    with pytest.raises(
        DiffalignError, match="negative_prompt: FLUX.2 steers away from the empty prompt or from nothing"
    ):
        backbone.sample(PROMPTS, SEEDS, steps=2, guidance_scale=1.0, negative_prompt="blur", **SIZE)
    backbone.pipeline.scheduler.register_to_config(use_dynamic_shifting=False)
    with pytest.raises(DiffalignError, match="FLUX.2 needs a FlowMatch scheduler with use_dynamic_shifting"):
        backbone.build_process(backbone.pipeline.scheduler)


def test_flux2_dev_takes_guidance_as_an_input(tmp_path: Path) -> None:
    from helpers import tiny

    backbone: Any = load_backbone(tiny.flux2_dev(tmp_path / "m"), guidance=2.5)
    assert backbone.family == "flux2" and backbone.guided and backbone.facts()["guidance"] == "2.5"
    conditioning = backbone.encode_prompts(PROMPTS)
    assert {key: tuple(value.shape[1:]) for key, value in conditioning.items()} == backbone.conditioning_shapes()
    x, steps = noise(backbone), backbone.sampler_steps(3, **SIZE)
    with torch.no_grad():
        for t, stop in zip(steps.times, steps.stops, strict=True):
            x = backbone.process.step(x, backbone.predict(x, t.repeat(2), conditioning), t.repeat(2), stop.repeat(2))
    expected = as_latents(backbone, plain(backbone, guidance_scale=2.5, output_type="latent"))
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=0)
    other = as_latents(backbone, plain(backbone, guidance_scale=5.0, output_type="latent"))
    assert not torch.allclose(other, expected, atol=1e-3)
    backbone.add_lora(2, 2.0)
    backbone.save_weights(tmp_path / "w")
    backbone.pipeline.load_lora_weights(tmp_path / "w")


# --- Sana --------------------------------------------------------------------------------------------------------------


def test_times_of_sana_are_those_of_its_solver(sana_dir: Path) -> None:
    backbone: Any = load_backbone(sana_dir, **CASES["sana"].options)
    scheduler = backbone.pipeline.scheduler
    for steps in (4, 20):
        scheduler.set_timesteps(steps)
        torch.testing.assert_close(backbone.process.schedule(steps), scheduler.sigmas, atol=1e-6, rtol=0)
    with pytest.raises(DiffalignError, match=r"DPMSolver.*set sampler\.scheduler=flow_euler"):
        backbone.sampling_times(4, 64, 64)
    backbone.use_scheduler("flow_euler", {})
    assert backbone.process.shift == 3.0 and backbone.pipeline.scheduler.config.shift == 3.0


def test_the_instruction_of_sana_is_an_option(sana_dir: Path) -> None:
    with_it, without = (load_backbone(sana_dir, max_sequence_length=24, instruction=on) for on in (True, False))
    one, other = (backbone.encode_prompts(["a cat"]) for backbone in (with_it, without))
    assert one["prompt_embeds"].shape == other["prompt_embeds"].shape
    assert not torch.allclose(one["prompt_embeds"], other["prompt_embeds"])
    assert with_it.fingerprint() != without.fingerprint()  # by which caches are told apart
    pipeline: Any = without.pipeline
    embeds = pipeline.encode_prompt("a cat", False, max_sequence_length=24)[0]
    assert torch.equal(embeds, other["prompt_embeds"]) and without.call_options()["complex_human_instruction"] is None


def test_gemma_runs_in_bfloat16_where_the_trunk_is_float16(sana_dir: Path) -> None:
    backbone = load_backbone(sana_dir, dtype=torch.float16, max_sequence_length=24)
    pipeline: Any = backbone.pipeline
    assert (pipeline.text_encoder.dtype, pipeline.transformer.dtype, pipeline.vae.dtype) == (
        torch.bfloat16, torch.float16, torch.float32,
    )  # fmt: skip
