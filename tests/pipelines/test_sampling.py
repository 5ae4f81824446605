"""The process steps and `sample` against the diffusers pipelines themselves, and encoding and decoding."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.errors import DiffalignError
from diffalign.pipelines import Backbone, load_backbone
from diffalign.pipelines.settings import SamplingSettings
from helpers import tiny

PROMPTS, SEEDS = ["a red circle", "Zwei blaue Quadrate, 二"], [3, 4]


def loop(backbone: Backbone, steps: int) -> torch.Tensor:
    """Sample with predict and process.step, no guidance; latents [2, C, 8, 8]."""
    shape = (1, backbone.latent_channels, 8, 8)
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in SEEDS])
    conditioning = backbone.encode_prompts(PROMPTS)
    times = backbone.process.schedule(steps)
    x = backbone.process.initial(noise)
    for t, t_next in pairwise(times):
        now, then = t.repeat(2), t_next.repeat(2)
        with torch.no_grad():
            x = backbone.process.step(x, backbone.predict(x, now, conditioning), now, then)
    return x


def check_loop(folder: Path, steps: int) -> None:
    backbone = load_backbone(folder)
    # The plain pipeline, as its users call it: the loop shares none of its scheduler's code.
    plain = backbone.pipeline(
        PROMPTS,
        generator=[torch.Generator().manual_seed(s) for s in SEEDS],
        num_inference_steps=steps,
        guidance_scale=1.0,
        output_type="latent",
        **backbone.sampling_options(),
    ).images
    assert float(plain.std()) > 0.1
    torch.testing.assert_close(loop(backbone, steps), plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("steps", [4, 7])
def test_loop_equals_sd15(sd15_dir: Path, steps: int) -> None:
    check_loop(sd15_dir, steps)


@pytest.mark.parametrize("steps", [4, 7])
def test_loop_equals_sdxl_with_euler(sdxl_dir: Path, steps: int) -> None:
    check_loop(sdxl_dir, steps)


@pytest.mark.parametrize("steps", [4, 10])
def test_loop_equals_sd3_with_shift_3(sd3_dir: Path, steps: int) -> None:
    check_loop(sd3_dir, steps)


@pytest.mark.parametrize(
    "options",
    [
        {"scheduler": "ddim"},
        {"prediction_type": "v_prediction"},
        {"timestep_spacing": "linspace"},
        {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {"scheduler": "ddim", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
         "timestep_spacing": "trailing"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)  # fmt: skip
def test_loop_equals_sdxl_with_other_schedulers(tmp_path: Path, options: dict[str, Any]) -> None:
    check_loop(tiny.sdxl(tmp_path / "model", **options), 5)


def test_loop_equals_sd3_without_t5(tmp_path: Path) -> None:
    check_loop(tiny.sd3(tmp_path / "model", t5=False, shift=1.5), 3)


def test_loop_equals_sd35(tmp_path: Path) -> None:
    """SD3.5-medium: query and key norms, and a second attention in some blocks."""
    check_loop(tiny.sd3(tmp_path / "model", qk_norm="rms_norm", dual_attention_layers=(0,)), 3)


def test_sample_equals_plain_diffusers(sdxl_dir: Path, sd3_dir: Path) -> None:
    """With guidance and a negative prompt; the plain pipeline also decodes."""
    for folder in (sdxl_dir, sd3_dir):
        backbone = load_backbone(folder)
        images = backbone.sample(PROMPTS, SEEDS, steps=3, guidance_scale=4.0, negative_prompt="x", output_type="pil")
        plain = backbone.pipeline(
            PROMPTS,
            negative_prompt=["x", "x"],
            generator=[torch.Generator().manual_seed(s) for s in SEEDS],
            num_inference_steps=3,
            guidance_scale=4.0,
            **backbone.sampling_options(),
        ).images
        assert [i.tobytes() for i in images] == [i.tobytes() for i in plain]
        assert images[0].size == (64, 64) and images[0].tobytes() != images[1].tobytes()


def test_output_types_agree_and_size_is_free(sd15_dir: Path) -> None:
    backbone = load_backbone(sd15_dir)
    options = {"steps": 2, "guidance_scale": 1.0, "height": 80, "width": 48}
    pixels = backbone.sample(PROMPTS, SEEDS, output_type="pt", **options)
    latents = backbone.sample(PROMPTS, SEEDS, output_type="latent", **options)
    assert pixels.shape == (2, 3, 80, 48) and pixels.dtype == torch.float32
    assert latents.shape == (2, 4, 10, 6)
    assert torch.equal(backbone.decode_latents(latents), pixels)
    assert float(pixels.min()) >= 0 and float(pixels.max()) <= 1
    image = backbone.sample(PROMPTS, SEEDS, **options)[0]
    assert image.size == (48, 80)


def test_settings_are_their_fields_one_by_one(sdxl_dir: Path) -> None:
    backbone = load_backbone(sdxl_dir)
    single: dict[str, Any] = {"steps": 2, "guidance_scale": 3.0, "negative_prompt": "x", "height": 64, "width": 80}
    expected = backbone.sample(PROMPTS, SEEDS, output_type="latent", **single)
    settings = SamplingSettings(**single)
    assert torch.equal(backbone.sample(PROMPTS, SEEDS, settings, output_type="latent"), expected)
    other = SamplingSettings(steps=1, guidance_scale=3.0, negative_prompt="x")
    found = backbone.sample(PROMPTS, SEEDS, other, steps=2, height=64, width=80, output_type="latent")
    assert torch.equal(found, expected)
    encoded = backbone.encode_guided(PROMPTS, "x")
    assert torch.equal(backbone.sample_encoded(encoded, SEEDS, settings, output_type="latent"), expected)
    with pytest.raises(TypeError, match="guidance_scale"):
        backbone.sample(PROMPTS, SEEDS, steps=2)


def test_a_seed_means_the_same_image_in_any_place(sd3_dir: Path) -> None:
    backbone = load_backbone(sd3_dir)
    options = {"steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
    first = backbone.sample(PROMPTS, SEEDS, **options)
    swapped = backbone.sample(PROMPTS[::-1], SEEDS[::-1], **options)
    torch.testing.assert_close(first, swapped.flip(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1]}, "2 prompts and 1 seeds"),
        ({"seeds": [1, 2**32]}, "seed 4294967296 is outside"),
        ({"seeds": [-1, 0]}, "seed -1 is outside"),
        ({"height": 60}, "60x64 pixels are not multiples of 8"),
        ({"output_type": "np"}, "unknown output_type 'np'"),
        ({"steps": 0}, "0 sampling steps asked for"),
    ],
)
def test_sample_refuses(sd15_dir: Path, options: dict[str, object], message: str) -> None:
    arguments = {"seeds": SEEDS, "steps": 1, "guidance_scale": 1.0} | options
    with pytest.raises(DiffalignError, match=message):
        load_backbone(sd15_dir).sample(PROMPTS, **arguments)


def test_images_are_encoded_with_scale_and_shift(sd3_dir: Path) -> None:
    backbone = load_backbone(sd3_dir)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    vae = backbone.pipeline.vae
    with torch.no_grad():
        mean = vae.encode(pixels * 2 - 1).latent_dist.mean
    expected = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    latents = backbone.encode_images(pixels)
    torch.testing.assert_close(latents, expected)
    assert latents.dtype == torch.float32 and not latents.requires_grad
    # Decoding undoes the scaling: the decoder sees the posterior mean.
    with torch.no_grad():
        decoded = (vae.decode(mean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(backbone.decode_latents(latents), decoded, atol=1e-5, rtol=0)


def test_decoding_is_differentiable(sd15_dir: Path) -> None:
    latents = torch.randn(1, 4, 8, 8).requires_grad_()
    load_backbone(sd15_dir).decode_latents(latents).mean().backward()
    assert latents.grad is not None and float(latents.grad.abs().sum()) > 0


def test_vae_runs_in_float32_under_a_bf16_model(sdxl_dir: Path) -> None:
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    half, full = load_backbone(sdxl_dir, dtype=torch.bfloat16), load_backbone(sdxl_dir)
    assert half.pipeline.vae.config.force_upcast
    assert torch.equal(half.encode_images(pixels), full.encode_images(pixels))
    assert next(half.trunk.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 60, 64)])
def test_images_of_wrong_shape_are_refused(sd15_dir: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(DiffalignError, match="cannot be encoded"):
        load_backbone(sd15_dir).encode_images(torch.zeros(shape))


def test_micro_conditioning_follows_the_latents(sdxl_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(sdxl_dir)
    conditioning = backbone.encode_prompts(PROMPTS)
    seen: list[torch.Tensor] = []
    forward = backbone.trunk.forward

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append(options["added_cond_kwargs"]["time_ids"])
        return forward(*arguments, **options)

    monkeypatch.setattr(backbone.trunk, "forward", spy)
    backbone.predict(torch.zeros(2, 4, 10, 6), torch.tensor([5.0, 6.0]), conditioning)
    assert seen[0].tolist() == [[80, 48, 0, 0, 80, 48]] * 2


def test_prompt_length_of_t5(sd3_dir: Path, tmp_path: Path) -> None:
    """16 CLIP positions; T5's own limit of 12 unless a length is given; zeros where T5 is left out."""
    assert load_backbone(sd3_dir).encode_prompts(PROMPTS)["prompt_embeds"].shape == (2, 28, 32)
    short = load_backbone(sd3_dir, max_sequence_length=5).encode_prompts(PROMPTS)["prompt_embeds"]
    assert short.shape == (2, 21, 32) and float(short[:, 16:].abs().min(dim=2).values.max()) > 0
    without = load_backbone(sd3_dir, max_sequence_length=5, use_t5=False)
    assert without.pipeline.text_encoder_3 is None
    embeds = without.encode_prompts(PROMPTS)["prompt_embeds"]
    assert embeds.shape == (2, 21, 32) and float(embeds[:, 16:].abs().max()) == 0
    torch.testing.assert_close(embeds[:, :16], short[:, :16])


@pytest.mark.parametrize("text", ["", "猫と犬 🙂", "\0", "x" * 500, "<|endoftext|> after"])
def test_any_prompt_tokenises(sd15_dir: Path, sd3_dir: Path, text: str) -> None:
    for folder in (sd15_dir, sd3_dir):
        embeds = load_backbone(folder).encode_prompts([text])["prompt_embeds"]
        assert embeds.shape[0] == 1 and bool(torch.isfinite(embeds).all())


def test_text_encoders_may_stay(sdxl_dir: Path) -> None:
    backbone = load_backbone(sdxl_dir)
    before = backbone.encode_prompts(PROMPTS)["prompt_embeds"]
    backbone.drop_encoders(keep_text=True)
    assert backbone.pipeline.vae is None and torch.equal(backbone.encode_prompts(PROMPTS)["prompt_embeds"], before)
    with pytest.raises(DiffalignError, match="vae was freed by drop_encoders"):
        backbone.encode_images(torch.zeros(1, 3, 64, 64))


def test_the_posterior_is_the_vaes_own(sd3_dir: Path) -> None:
    """Scaled as the trunk has it: a sample is mean + spread * noise, shifted and scaled like the VAE's own sample."""
    backbone = load_backbone(sd3_dir)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, spread = backbone.encode_posterior(pixels)
    vae = backbone.pipeline.vae
    with torch.no_grad():
        own = vae.encode(pixels * 2 - 1).latent_dist
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    want = (own.sample(torch.Generator().manual_seed(1)) - vae.config.shift_factor) * vae.config.scaling_factor
    torch.testing.assert_close(mean + spread * noise, want)
    assert torch.equal(backbone.encode_images(pixels), mean) and vae.dtype == torch.float32
    assert load_backbone(sd3_dir, dtype=torch.bfloat16).pipeline.vae.dtype == torch.float32


def test_dropped_encoders_free_memory_but_not_the_trunk(sd3_dir: Path) -> None:
    backbone = load_backbone(sd3_dir)
    conditioning, tokens = backbone.encode_prompts(PROMPTS), backbone.prompt_tokens()
    before = backbone.predict(torch.ones(2, 16, 8, 8), torch.tensor([0.5, 0.5]), conditioning)
    backbone.drop_encoders()
    assert backbone.pipeline.text_encoder is None and backbone.pipeline.vae is None
    assert torch.equal(backbone.predict(torch.ones(2, 16, 8, 8), torch.tensor([0.5, 0.5]), conditioning), before)
    assert (backbone.prompt_tokens(), backbone.default_resolution, backbone.latent_channels) == (tokens, 64, 16)
    with pytest.raises(DiffalignError, match="freed by drop_encoders"):
        backbone.encode_prompts(PROMPTS)
    with pytest.raises(DiffalignError, match="freed by drop_encoders"):
        backbone.sample(PROMPTS, SEEDS, steps=1, guidance_scale=1.0)
