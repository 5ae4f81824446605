"""Models that are only drawn from, samplers by name, and that drawing is the pipeline's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.pipelines.generator import load_generator
from diffalign.pipelines.schedulers import replace_scheduler
from helpers import tiny

PROMPTS, SEEDS = ["a red dog", "two cats"], [3, 2**32 - 1]


def cascade(folder: Path) -> tuple[Path, Path]:
    """A tiny decoder and its prior."""
    from diffusers import DDPMWuerstchenScheduler, StableCascadeDecoderPipeline, StableCascadePriorPipeline
    from diffusers.models import StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=32, projection_dim=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16, bos_token_id=tiny.START, eos_token_id=tiny.END,
        pad_token_id=tiny.END,
    )  # fmt: skip
    prior_unet = StableCascadeUNet(
        conditioning_dim=16, block_out_channels=[16, 16], num_attention_heads=[2, 2], down_num_layers_per_block=[1, 1],
        up_num_layers_per_block=[1, 1], switch_level=[False], clip_image_in_channels=16, clip_text_in_channels=16,
        clip_text_pooled_in_channels=16, clip_seq=2, dropout=[0.0, 0.0], in_channels=4, out_channels=4,
        timestep_ratio_embedding_dim=16, block_types_per_layer=[["SDCascadeResBlock", "SDCascadeAttnBlock"]] * 2,
        up_blocks_repeat_mappers=[1, 1], down_blocks_repeat_mappers=[1, 1],
    )  # fmt: skip
    decoder = StableCascadeUNet(
        in_channels=4, out_channels=4, conditioning_dim=16, block_out_channels=[8, 16], num_attention_heads=[-1, 2],
        down_num_layers_per_block=[1, 1], up_num_layers_per_block=[1, 1], down_blocks_repeat_mappers=[1, 1],
        up_blocks_repeat_mappers=[1, 1], block_types_per_layer=[["SDCascadeResBlock"]] * 2, effnet_in_channels=4,
        clip_text_pooled_in_channels=16, clip_seq=1, dropout=[0.0, 0.0], timestep_ratio_embedding_dim=16,
    )  # fmt: skip
    encoder, tokenizer = CLIPTextModelWithProjection(text), tiny.clip_tokenizer()
    first: Any = StableCascadePriorPipeline(
        tokenizer=tokenizer, text_encoder=encoder, prior=prior_unet, scheduler=DDPMWuerstchenScheduler()
    )
    second: Any = StableCascadeDecoderPipeline(
        decoder=decoder, tokenizer=tokenizer, text_encoder=encoder, scheduler=DDPMWuerstchenScheduler(),
        vqgan=PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=4, levels=1),
    )  # fmt: skip
    first.save_pretrained(folder / "prior")
    second.save_pretrained(folder / "decoder")
    return folder / "decoder", folder / "prior"


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_pixart_draws_as_its_pipeline_does(tmp_path: Path) -> None:
    """Also for the index of the published repository, which names the transformer by a former class."""
    from diffusers import PixArtSigmaPipeline

    generator = load_generator(tiny.pixart(tmp_path / "m"))
    given: dict[str, Any] = {"steps": 2, "guidance_scale": 4.5, "height": 64, "width": 64}
    drawn = pixels([image for image, _ in generator.draw(PROMPTS, SEEDS, **given)])
    plain: Any = PixArtSigmaPipeline.from_pretrained(tmp_path / "m")
    plain.set_progress_bar_config(disable=True)
    expected = plain(
        prompt=PROMPTS, generator=[torch.Generator().manual_seed(s) for s in SEEDS], num_inference_steps=2,
        guidance_scale=4.5, height=64, width=64, clean_caption=False, use_resolution_binning=False,
    ).images  # fmt: skip
    assert np.array_equal(drawn, pixels(expected))
    assert generator.facts()["pipeline"] == "PixArtSigmaPipeline" and generator.facts()["revision"] is None
    with pytest.raises(DiffalignError, match="seed 4294967296 is outside"):
        generator.draw(PROMPTS, [0, 2**32], **given)


def test_cascade_runs_both_stages(tmp_path: Path) -> None:
    decoder, prior = cascade(tmp_path)
    generator = load_generator(decoder, prior=str(prior))
    given: dict[str, Any] = {"guidance_scale": 4.0, "height": 128, "width": 128}
    one, two = (pixels([i for i, _ in generator.draw(PROMPTS, SEEDS, steps=2, **given)]) for _ in range(2))
    assert np.array_equal(one, two) and one.shape[0] == 2
    other = generator.draw(PROMPTS, [4, SEEDS[1]], steps=2, **given)
    assert not np.array_equal(pixels([other[0][0]])[0], one[0])
    more = generator.draw(PROMPTS, SEEDS, steps=2, **given, options={"decoder_steps": 3})
    assert not np.array_equal(pixels([i for i, _ in more]), one)
    with pytest.raises(DiffalignError, match="options.strides is unknown; there are decoder_guidance, decoder_steps"):
        generator.draw(PROMPTS, SEEDS, steps=2, **given, options={"strides": 3})
    with pytest.raises(DiffalignError, match="latents=false"):
        generator.draw(PROMPTS, SEEDS, steps=2, **given, latents=True)
    with pytest.raises(DiffalignError, match="seed 4294967296 is outside"):
        generator.draw(PROMPTS, [0, 2**32], steps=2, **given)
    generator.close()


def test_a_backbone_with_and_without_latents(sd3_dir: Path) -> None:
    generator = load_generator(sd3_dir, max_sequence_length=12)
    given: dict[str, Any] = {"steps": 2, "guidance_scale": 2.0}
    plain, kept = generator.draw(PROMPTS, SEEDS, **given), generator.draw(PROMPTS, SEEDS, **given, latents=True)
    assert np.array_equal(pixels([i for i, _ in plain]), pixels([i for i, _ in kept]))
    assert plain[0][1] is None and kept[0][1] is not None and kept[0][1].shape == (16, 8, 8)
    with pytest.raises(DiffalignError, match="options are for pipelines without a backbone"):
        generator.draw(PROMPTS, SEEDS, **given, options={"decoder_steps": 3})
    with pytest.raises(DiffalignError, match="this is a rectified-flow model; use flow_euler, flow_heun"):
        replace_scheduler(generator.pipeline, "ddim", {})
    replace_scheduler(generator.pipeline, "flow_euler", {"shift": 1.0})
    assert not np.array_equal(
        pixels([i for i, _ in generator.draw(PROMPTS, SEEDS, **given)]), pixels([i for i, _ in kept])
    )


def test_samplers_by_name(sdxl_dir: Path, tmp_path: Path) -> None:
    generator = load_generator(sdxl_dir)
    with pytest.raises(DiffalignError, match="this is a diffusion model; use ddim"):
        replace_scheduler(generator.pipeline, "flow_euler", {})
    with pytest.raises(DiffalignError, match="dpmpp has no karras; it has .*use_karras_sigmas"):
        replace_scheduler(generator.pipeline, "dpmpp", {"karras": True})
    replace_scheduler(generator.pipeline, "dpmpp", {"use_karras_sigmas": True})
    assert generator.facts()["scheduler"] == "DPMSolverMultistepScheduler"
    assert generator.pipeline.scheduler.config.beta_schedule == "scaled_linear"  # the model's own
    assert len(generator.draw(PROMPTS, SEEDS, steps=2, guidance_scale=2.0)) == 2
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(DiffalignError, match="KandinskyPipeline is not supported"):
        load_generator(tmp_path)
