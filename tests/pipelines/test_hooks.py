"""The hooks of a family on pipelines that no family has yet: masks, plain and five-dimensional latents, other arguments.

Two toy families on the real pipelines of Sana and Qwen-Image, each tiny and with a table of characters for a text encoder.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.pipelines.attention import set_attention
from diffalign.pipelines.base import TransformerBackbone
from diffalign.pipelines.family import padded
from diffalign.pipelines.flux import FluxFlow, pack, unpack
from diffalign.pipelines.options import Options
from diffalign.pipelines.process import Flow
from diffalign.pipelines.settings import SamplingSettings
from diffalign.pipelines.source import Source
from diffalign.pipelines.vae import FrameVAE, PlainVAE
from helpers import tiny

WIDTH, LONGEST = 16, 12
PROMPTS, SEEDS = ["a dog", "two cats"], [3, 4]
SETTINGS = SamplingSettings(steps=3, guidance_scale=4.0, negative_prompt="blur", height=32, width=64)


class Characters(nn.Module):
    """A vector for each character, and the mask of a batch padded to `length` characters, or to the longest prompt."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(128, WIDTH)

    def encode(self, prompts: list[str], length: int | None = None) -> tuple[Tensor, Tensor]:
        codes = [[ord(c) for c in f"{prompt}."][:length] for prompt in prompts]
        longest = length or max(map(len, codes))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in codes])
        return self.table(ids), torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in codes])


class SanaToy(SanaPipeline):
    """Its prompts come with masks, padded to a fixed length, and its VAE gives plain latents."""

    def _get_gemma_prompt_embeds(self, prompt: Any, device: Any, dtype: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return self.text_encoder.encode([prompt] if isinstance(prompt, str) else prompt, options["max_sequence_length"])


class QwenToy(QwenImagePipeline):
    """Its masks are left out where all is True, its lengths vary, its guidance is called true_cfg_scale, its VAE is 5-D."""

    def _get_qwen_prompt_embeds(
        self, prompt: Any = None, device: Any = None, dtype: Any = None
    ) -> tuple[Tensor, Tensor]:
        return self.text_encoder.encode([prompt] if isinstance(prompt, str) else prompt)


class Toy(TransformerBackbone):
    """What both toys share."""

    family = "toy"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def prompt_tokens(self) -> int:
        return LONGEST


class Sana(Toy):
    blocks = ("SanaTransformerBlock",)
    vae_kind = PlainVAE
    conditioning: ClassVar[tuple[str, ...]] = ("prompt_embeds", "prompt_attention_mask")
    encoder_outputs: ClassVar[tuple[str, ...]] = (
        "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask",
    )  # fmt: skip
    prompt_masks = ("prompt_attention_mask",)

    @classmethod
    def pipeline_class(cls) -> type[SanaToy]:
        return SanaToy

    def build_process(self, scheduler: Any) -> Flow:
        return Flow(scheduler.config.shift)

    def negative_prompts(self, negative: str | None, count: int) -> list[str]:
        return [negative or ""] * count

    def encoding_options(self) -> dict[str, object]:
        return {"max_sequence_length": LONGEST}

    def pipeline_inputs(self, encoded: dict[str, Tensor]) -> dict[str, object]:
        return {**encoded, "negative_prompt": None}  # its default is "", which cannot go beside embeddings

    def sampling_options(self) -> dict[str, object]:
        return {"max_sequence_length": LONGEST, "complex_human_instruction": None, "use_resolution_binning": False}

    def forward(self, module: nn.Module, noisy: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return module(
            noisy, conditioning["prompt_embeds"], time, encoder_attention_mask=conditioning["prompt_attention_mask"],
            return_dict=False,
        )[0]  # fmt: skip


class Qwen(Toy):
    blocks = ("QwenImageTransformerBlock",)
    vae_kind = FrameVAE
    conditioning: ClassVar[tuple[str, ...]] = ("prompt_embeds", "prompt_embeds_mask")
    prompt_masks = ("prompt_embeds_mask",)
    scheduler_seeded = False

    @classmethod
    def pipeline_class(cls) -> type[QwenToy]:
        return QwenToy

    def build_process(self, scheduler: Any) -> FluxFlow:
        return FluxFlow(8, base_tokens=256, max_tokens=4096, base_shift=0.5, max_shift=1.15)

    @property
    def pixel_multiple(self) -> int:
        return 2 * self.vae_scale_factor

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, mask = self.pipeline.encode_prompt(prompts, device=self.device)
        return dict(zip(self.conditioning, padded(embeds, mask, LONGEST), strict=True))

    def encode_guided_prompts(self, prompts: list[str], negatives: list[str] | None) -> dict[str, Tensor]:
        negative = self.encode(negatives) if negatives else {}
        return self.encode(prompts) | {f"negative_{name}": value for name, value in negative.items()}

    def guidance_arguments(self, scale: float) -> dict[str, float]:
        return {"true_cfg_scale": scale}

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        return unpack(latents, height, width)

    def forward(self, module: nn.Module, noisy: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        height, width = noisy.shape[-2:]
        tokens = module(
            pack(noisy), conditioning["prompt_embeds"], conditioning["prompt_embeds_mask"], time / 1000,
            [[(1, height // 2, width // 2)]] * len(noisy), return_dict=False,
        )[0]  # fmt: skip
        return unpack(tokens, height, width)


def plain_vae() -> AutoencoderDC:
    torch.manual_seed(0)
    return tiny.dc_ae().eval()


def frame_vae() -> AutoencoderKLQwenImage:
    torch.manual_seed(0)
    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 2.0, 1.0],
    ).eval()  # fmt: skip


def sana() -> Sana:
    vae = plain_vae()
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH,
        sample_size=4,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = SanaToy(None, Characters(), vae, transformer, scheduler)
    return Sana(pipeline, Source("toy", Path("toy"), None), dtype=torch.float32, device="cpu", options=Options())


def qwen() -> Qwen:
    vae = frame_vae()
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = QwenToy(scheduler, vae, Characters(), None, transformer)
    return Qwen(pipeline, Source("toy", Path("toy"), None), dtype=torch.float32, device="cpu", options=Options())


BUILDERS: dict[str, Any] = {"sana": sana, "qwen": qwen}
GUIDANCE = {"sana": "guidance_scale", "qwen": "true_cfg_scale"}


@pytest.fixture(params=list(BUILDERS))
def toy(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, BUILDERS[request.param]()


def plain(backbone: Any, name: str, scale: float, **options: Any) -> Any:
    """The pipeline as its users call it."""
    negative = {"negative_prompt": [SETTINGS.negative_prompt] * 2} if scale > 1 else {}
    return backbone.pipeline(
        PROMPTS, generator=[torch.Generator().manual_seed(s) for s in SEEDS], num_inference_steps=3, height=32, width=64,
        **{GUIDANCE[name]: scale}, **negative, **backbone.sampling_options(), **options,
    ).images  # fmt: skip


def images(height: int = 32, width: int = 64) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_a_vae_without_distribution() -> None:
    backbone, vae, pixels = sana(), plain_vae(), images()
    with torch.no_grad():
        expected = vae.encode(2 * pixels - 1).latent * 0.41
        decoded = vae.decode(expected / 0.41).sample
    latents, spread = backbone.encode_posterior(pixels)
    assert latents.shape == (2, 4, 4, 8) and backbone.latent_channels == 4 and not spread.any()
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(backbone.decode_latents(latents), (decoded / 2 + 0.5).clamp(0, 1))


def test_a_vae_of_frames() -> None:
    """As QwenImagePipeline has it: latents / (1 / std) + mean, one frame, a mean and a deviation for each channel."""
    backbone, vae, pixels = qwen(), frame_vae(), images()
    mean, std = (torch.tensor(v).view(1, 4, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        posterior = vae.encode(2 * pixels[:, :, None] - 1).latent_dist
        expected = (posterior.mean - mean) / std
        decoded = vae.decode(expected / (1.0 / std) + mean).sample[:, :, 0]
    latents, spread = backbone.encode_posterior(pixels)
    assert latents.shape == (2, 4, 4, 8) and backbone.latent_channels == 4
    torch.testing.assert_close(latents, expected[:, :, 0])
    torch.testing.assert_close(spread, (posterior.std / std)[:, :, 0])
    torch.testing.assert_close(backbone.decode_latents(latents), (decoded / 2 + 0.5).clamp(0, 1))
    with pytest.raises(DiffalignError, match="multiples of 16 needed"):
        backbone.encode_images(images(40))


def test_decoding_is_differentiable(toy: tuple[str, Any]) -> None:
    latents = torch.randn(1, 4, 4, 4).requires_grad_()
    toy[1].decode_latents(latents).mean().backward()
    assert latents.grad is not None and float(latents.grad.abs().sum()) > 0


def test_sample_is_the_pipelines_own(toy: tuple[str, Any]) -> None:
    name, backbone = toy
    drawn = backbone.sample(PROMPTS, SEEDS, SETTINGS)
    assert [i.tobytes() for i in drawn] == [i.tobytes() for i in plain(backbone, name, 4.0)]
    unguided = backbone.sample(PROMPTS, SEEDS, SETTINGS, guidance_scale=1.0, negative_prompt=None)
    assert [i.tobytes() for i in unguided] == [i.tobytes() for i in plain(backbone, name, 1.0)]
    assert drawn[0].size == (64, 32) and drawn[0].tobytes() != unguided[0].tobytes()


def test_encoded_prompts_draw_the_same_images(toy: tuple[str, Any]) -> None:
    _, backbone = toy
    expected = backbone.sample(PROMPTS, SEEDS, SETTINGS, output_type="latent")
    encoded = backbone.encode_guided(PROMPTS, SETTINGS.negative_prompt)
    assert all(len(value) == 2 for value in encoded.values())
    assert {n.removeprefix("negative_") for n in encoded if n.startswith("negative_")} == set(backbone.conditioning)
    backbone.drop_encoders(keep_vae=True)
    found = backbone.sample_encoded(encoded, SEEDS, SETTINGS, output_type="latent")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # padding is masked, and added in another order


def test_a_loop_of_steps_equals_the_pipeline(toy: tuple[str, Any]) -> None:
    name, backbone = toy
    conditioning = backbone.encode_prompts(PROMPTS)
    x = torch.cat([torch.randn(1, 4, 4, 8, generator=torch.Generator().manual_seed(s)) for s in SEEDS])
    times = backbone.process.schedule(3)
    with torch.no_grad():
        for t, t_next in pairwise(times):
            prediction = backbone.predict(x, t.repeat(2), conditioning)
            x = backbone.process.step(x, prediction, t.repeat(2), t_next.repeat(2))
    expected = backbone.from_pipeline(plain(backbone, name, 1.0, output_type="latent"), 4, 8)
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=0)


def test_masks_have_one_shape_and_hide_the_padding(toy: tuple[str, Any]) -> None:
    """Also after a store has kept them as numbers; without its mask a prompt's padding would count."""
    _, backbone = toy
    short, both = backbone.encode_prompts(PROMPTS[:1]), backbone.encode_prompts(PROMPTS)
    mask = backbone.prompt_masks[0]
    assert {name: value.shape[1:] for name, value in short.items()} == {n: v.shape[1:] for n, v in both.items()}
    assert both[mask].sum(dim=1).tolist() == [len(p) + 1 for p in PROMPTS] and both[mask].shape == (2, LONGEST)
    noisy, t = torch.randn(1, 4, 4, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])

    def predict(conditioning: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return backbone.predict(noisy, t, conditioning)

    expected = predict(short)
    stored = {name: value.to(torch.bfloat16) for name, value in short.items()}
    assert torch.equal(predict(short | {mask: stored[mask]}), expected)
    filled = short["prompt_embeds"].clone()
    filled[:, len(PROMPTS[0]) + 1 :] = 5.0
    torch.testing.assert_close(predict(short | {"prompt_embeds": filled}), expected, atol=1e-6, rtol=1e-5)
    seen = predict({"prompt_embeds": filled, mask: torch.ones_like(short[mask])})
    assert not torch.allclose(seen, expected, atol=1e-4)


def test_padding_fills_cuts_and_makes_up_for_a_missing_mask() -> None:
    embeds = torch.arange(6.0).view(1, 3, 2)
    longer, mask = padded(embeds, torch.tensor([[1, 1, 0]]), 4)
    assert longer.tolist() == [[[0, 1], [2, 3], [4, 5], [0, 0]]] and mask.tolist() == [[True, True, False, False]]
    shorter, mask = padded(embeds, None, 2)
    assert shorter.tolist() == [[[0, 1], [2, 3]]] and mask.tolist() == [[True, True]]


def test_a_fresh_lora_is_the_reference(toy: tuple[str, Any]) -> None:
    _, backbone = toy
    backbone.add_lora(2, 2.0)
    conditioning = backbone.encode_prompts(PROMPTS)
    noisy, t = torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
    with torch.no_grad(), backbone.role("reference"):
        reference = backbone.predict(noisy, t, conditioning)
    assert torch.equal(backbone.predict(noisy, t, conditioning), reference)
    assert type(backbone.middle_block()).__name__ == backbone.blocks[0]


def test_kernels_of_other_processors() -> None:
    """Those that go through diffusers' dispatcher take any; one that has a single kernel takes no other."""
    dispatched: Any = qwen().trunk
    set_attention(dispatched, "flash")
    assert {p._attention_backend for p in dispatched.attn_processors.values()} == {"_native_flash"}
    single: Any = sana().trunk
    before = dict(single.attn_processors)
    set_attention(single, "sdpa")
    assert {type(p) for p in single.attn_processors.values()} == {type(p) for p in before.values()}
    with pytest.raises(DiffalignError, match=r"model\.attention: Sana.* one kernel only; use attention: sdpa"):
        set_attention(single, "flash")
