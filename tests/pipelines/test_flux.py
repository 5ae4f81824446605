"""FLUX.1-dev on a tiny random checkpoint: sampling, guidance embedding, training, refusals. LoRA: test_adapters."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from diffalign.config import SampleConfig
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.training_source import check_guidance
from diffalign.data.writer import ImageWriter, write_groups
from diffalign.errors import DiffalignError
from diffalign.pipelines import Flow, load_backbone
from diffalign.pipelines.flux import FluxFlow, pack, unpack
from diffalign.stages.sample import sample
from helpers import tiny, toy
from helpers.tiny_training import Source, config_for

PROMPTS, SEEDS = ["a red circle", "Zwei blaue Quadrate, 二"], [3, 4]


@pytest.mark.parametrize(("steps", "side"), [(4, 64), (7, 96)])
def test_loop_equals_flux(flux_dir: Path, steps: int, side: int) -> None:
    backbone = load_backbone(flux_dir, guidance=2.5)
    process = backbone.process
    assert isinstance(process, FluxFlow)
    plain = backbone.pipeline(
        PROMPTS,
        generator=[torch.Generator().manual_seed(s) for s in SEEDS],
        num_inference_steps=steps,
        guidance_scale=2.5,
        height=side,
        width=side,
        output_type="latent",
        **backbone.sampling_options(),
    ).images
    shape = (1, 16, side // 8, side // 8)
    x = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in SEEDS])
    conditioning = backbone.encode_prompts(PROMPTS)
    for t, t_next in pairwise(process.schedule(steps, tokens=(side // 16) ** 2)):
        now, then = t.repeat(2), t_next.repeat(2)
        with torch.no_grad():
            x = process.step(x, backbone.predict(x, now, conditioning), now, then)
    expected = unpack(plain, side // 8, side // 8)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=0)


def test_sample_equals_plain_diffusers(flux_dir: Path) -> None:
    backbone = load_backbone(flux_dir)
    images = backbone.sample(PROMPTS, SEEDS, steps=3, guidance_scale=4.0, height=64, width=96)
    plain = backbone.pipeline(
        PROMPTS,
        generator=[torch.Generator().manual_seed(s) for s in SEEDS],
        num_inference_steps=3,
        guidance_scale=4.0,
        height=64,
        width=96,
        **backbone.sampling_options(),
    ).images
    assert [i.tobytes() for i in images] == [i.tobytes() for i in plain] and images[0].size == (96, 64)


def test_schedule_equals_the_scheduler() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    process = FluxFlow(4096, base_tokens=256, max_tokens=4096, base_shift=0.5, max_shift=1.15)
    for tokens, steps in ((4096, 28), (1024, 10), (16, 4)):
        even = [1.0 - i * (1.0 - 1.0 / steps) / (steps - 1) for i in range(steps)]
        scheduler.set_timesteps(sigmas=even, mu=calculate_shift(tokens))
        torch.testing.assert_close(process.schedule(steps, tokens), scheduler.sigmas, atol=1e-6, rtol=0)
    torch.testing.assert_close(process.schedule(28), process.schedule(28, 4096))
    assert isinstance(process, Flow) and process.shift_of(4096) == pytest.approx(2.71828**1.15, rel=1e-4)


def test_pack_is_undone_and_orders_as_the_pipeline(flux_dir: Path) -> None:
    latents = torch.randn(2, 16, 6, 4, generator=torch.Generator().manual_seed(0))
    pipeline: Any = load_backbone(flux_dir).pipeline
    assert torch.equal(pack(latents), pipeline._pack_latents(latents, 2, 16, 6, 4))
    assert torch.equal(unpack(pack(latents), 6, 4), latents)


def test_guidance_is_an_input_of_the_network(flux_dir: Path) -> None:
    arguments = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    found = []
    for guidance in (1.0, 3.5, 3.5):
        backbone = load_backbone(flux_dir, guidance=guidance)
        assert backbone.facts()["guidance"] == f"{guidance:g}"
        found.append(backbone.predict(*arguments, backbone.encode_prompts(["x"])))
    assert torch.equal(found[1], found[2]) and not torch.allclose(found[0], found[1], atol=1e-5)


def test_other_families_have_none(sd15_dir: Path) -> None:
    with pytest.raises(DiffalignError, match=r"model\.options\.guidance: .* is of family sd15, .*; it has none"):
        load_backbone(sd15_dir, guidance=7.0)
    backbone = load_backbone(sd15_dir)
    assert backbone.guidance is None and "guidance" not in backbone.facts()


@pytest.mark.parametrize("noise", ["shared", "inverted"])
def test_training_starts_at_the_reference_and_moves(flux_dir: Path, tmp_path: Path, noise: str) -> None:
    backbone = load_backbone(flux_dir)
    plain = config_for(flux_dir, tmp_path, 4, optimizer={"lr": 1e-2}, noise=noise)
    objective = {"name": "gdro", "beta": 200.0, "tau": 0.05, "gamma": 0.5}
    config = type(plain).model_validate({**plain.model_dump(mode="json"), "objective": objective})
    toy.train(config, backbone=backbone, source=Source(backbone), say=lambda _: None)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["margin"] == 0.0 and rows[0]["drift"] == 0.0 and rows[0]["implicit_spread"] == 0.0
    assert rows[-1]["drift"] > 0 and rows[-1]["implicit_spread"] > 0 and rows[0]["grad_norm"] > 0
    assert (tmp_path / "weights" / "pytorch_lora_weights.safetensors").is_file()


def dataset(folder: Path, *origins: dict[str, Any]) -> PreferenceDataset:
    """One group of two images for every origin."""
    with ImageWriter(folder) as writer:
        for n, origin in enumerate(origins):
            for k in range(2):
                writer.write(f"g{n}", k, Image.new("RGB", (8, 8)), "m", 0, origin)
    write_groups(
        folder,
        [
            {"group_id": f"g{n}", "prompt_id": "p", "prompt": "x", "preference": [1.0, 0.0],
             "split": "train" if n < 2 else "test", "metadata": {}}
            for n in range(len(origins))
        ],
    )  # fmt: skip
    return PreferenceDataset(folder)


def check(data: PreferenceDataset, guidance: float | None) -> None:
    section = SimpleNamespace(split="train", limit=None)
    check_guidance(section, data, SimpleNamespace(guidance=guidance, path="here/flux"))


def test_guidance_of_the_data_is_the_one_to_train_under(tmp_path: Path) -> None:
    origin = {"model": "there/flux", "guidance_scale": 2.5}
    data = dataset(tmp_path / "a", origin, {"file": "mine.png"}, {**origin, "guidance_scale": 9.0})
    check(data, 2.5)
    check(data, None)  # not a model that takes it
    with pytest.raises(
        DiffalignError, match=r"model\.options\.guidance=3\.5: .*guidance_scale=2\.5; set model\.options\.guidance=2\.5"
    ):
        check(data, 3.5)
    mixed = dataset(tmp_path / "b", origin, {**origin, "guidance_scale": 4.0})
    with pytest.raises(DiffalignError, match="guidance_scale=2.5, 4; train on those of one scale"):
        check(mixed, 4.0)
    check(dataset(tmp_path / "c", {"model": "sdxl", "guidance_scale": 7.0}), 3.5)


def test_refusals(flux_dir: Path, tmp_path: Path) -> None:
    backbone = load_backbone(flux_dir)
    with pytest.raises(DiffalignError, match="takes no negative prompt"):
        backbone.sample(PROMPTS, SEEDS, steps=1, guidance_scale=1.0, negative_prompt="x")
    with pytest.raises(DiffalignError, match="takes no negative prompt"):
        backbone.encode_guided(PROMPTS, "x")
    with pytest.raises(DiffalignError, match="72x64 pixels are not multiples of 16"):
        backbone.sample(PROMPTS, SEEDS, steps=1, guidance_scale=1.0, height=72, width=64)
    with pytest.raises(DiffalignError, match="multiples of 16 needed"):
        backbone.encode_images(torch.zeros(1, 3, 72, 64))
    with pytest.raises(DiffalignError, match="FLUX.1-schnell"):
        load_backbone(tiny.flux(tmp_path / "schnell", guidance_embeds=False))
    with pytest.raises(DiffalignError, match="needs a FlowMatch scheduler with use_dynamic_shifting"):
        load_backbone(tiny.flux(tmp_path / "fixed", use_dynamic_shifting=False))


def test_images_are_drawn_at_the_scale_to_train_under(flux_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a dog\na cat\n")
    config = SampleConfig.model_validate(
        {"model": {"path": str(flux_dir), "options": {"guidance": 2.0}}, "prompts": str(tmp_path / "p.txt"), "device": "cpu",
         "out": str(tmp_path / "data"), "steps": 1, "height": 64, "width": 64, "images_per_prompt": 2}
    )  # fmt: skip
    with pytest.raises(
        DiffalignError, match=r"guidance_scale=5: .* trained under model\.options\.guidance=2; set both"
    ):
        sample(config)
    sample(config.model_copy(update={"guidance_scale": 2.0}))
    drawn, section = PreferenceDataset(tmp_path / "data"), SimpleNamespace(split="train", limit=None)
    check_guidance(section, drawn, load_backbone(flux_dir, guidance=2.0))
    with pytest.raises(DiffalignError, match=r"set model\.options\.guidance=2"):
        check_guidance(section, drawn, load_backbone(flux_dir))


def test_attention_kernels_are_set_processor_by_processor(flux_dir: Path) -> None:
    backbone: Any = load_backbone(flux_dir, attention="flash")
    kernels = {p._attention_backend for p in backbone.trunk.attn_processors.values()}
    assert kernels == {"_native_flash"} and backbone.attention == "flash"
