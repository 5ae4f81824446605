"""Builders of tiny, random, but genuine diffusers checkpoints. A forward pass takes milliseconds.

Each writes a folder with `save_pretrained` and returns its path. The VAE shrinks 8x (four blocks); images are 64 x 64,
latents 8 x 8. The tokenizers hold 256 byte symbols (each also as a word end) and two special tokens, so they take any
text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 516  # 256 bytes, 256 bytes that end a word, two merges, two special tokens
START, END = 514, 515


def _symbols() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes (`bytes_to_unicode`), in byte order of the printable ones first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + i for i in range(256 - len(printable))]
    return [chr(code) for code in [*printable, *others]]


def clip_tokenizer(length: int = 16, pad_token: str = "<|endoftext|>") -> Any:
    from transformers import CLIPTokenizer

    symbols = _symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), "ed</w>", "en</w>", "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    assert len(vocab) == VOCABULARY
    merges: Any = [("e", "d</w>"), ("e", "n</w>")]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length, pad_token=pad_token)


def t5_tokenizer(length: int = 12) -> Any:
    from transformers import T5Tokenizer

    letters = [(chr(code), -4.0) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def _clip_config(width: int, length: int, projection: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, projection_dim=projection,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=length,
        bos_token_id=START, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip


def vae(channels: int = 4, **options: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8), norm_num_groups=2, layers_per_block=1, latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=64, **options,
    )  # fmt: skip


def _betas(prediction_type: str, **options: Any) -> dict[str, Any]:
    return {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
        "prediction_type": prediction_type, "timestep_spacing": "leading", **options,
    }  # fmt: skip


def _ddim(prediction_type: str, **options: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(**_betas(prediction_type, clip_sample=False, set_alpha_to_one=False, **options))


def sd15(path: str | Path, prediction_type: str = "epsilon", *, seed: int = 0, **scheduler: Any) -> Path:
    """Stable Diffusion 1.x: one CLIP encoder, DDIM; `scheduler` are options such as rescale_betas_zero_snr."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2,
    )  # fmt: skip
    pipeline: Any = StableDiffusionPipeline(
        unet=unet, vae=vae(), text_encoder=CLIPTextModel(_clip_config(16, 16, 16)), tokenizer=clip_tokenizer(),
        scheduler=_ddim(prediction_type, **scheduler), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(path)
    return Path(path)


def sdxl(
    path: str | Path, prediction_type: str = "epsilon", *, scheduler: str = "euler", seed: int = 0, **options: Any
) -> Path:
    """SDXL: two CLIP encoders and micro-conditioning. `scheduler` is euler (as SDXL ships) or ddim."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=(1, 2), transformer_layers_per_block=(1, 2),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )  # fmt: skip
    if scheduler == "euler":
        noise: Any = EulerDiscreteScheduler(**_betas(prediction_type, **options))
    else:
        noise = _ddim(prediction_type, **options)
    pipeline: Any = StableDiffusionXLPipeline(
        unet=unet, vae=vae(), scheduler=noise,
        text_encoder=CLIPTextModel(_clip_config(16, 16, 16)), tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(16, 16, 16)), tokenizer_2=clip_tokenizer(pad_token="!"),
        add_watermarker=False,
    )  # fmt: skip
    pipeline.save_pretrained(path)
    return Path(path)


def sd3(path: str | Path, t5: bool = True, *, shift: float = 3.0, seed: int = 0, **options: Any) -> Path:
    """SD3: two CLIP encoders and, if asked, T5. Without it model_index.json holds [null, null], as users have it.

    `options` reach the transformer: qk_norm and dual_attention_layers make it an SD3.5.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=16, out_channels=16, num_layers=2, num_attention_heads=2,
        attention_head_dim=8, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=16, **options,
    )  # fmt: skip
    t5_config = T5Config(vocab_size=98, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    pipeline: Any = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=CLIPTextModelWithProjection(_clip_config(16, 16, 16)), tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(16, 16, 16)), tokenizer_2=clip_tokenizer(pad_token="!"),
        text_encoder_3=T5EncoderModel(t5_config) if t5 else None, tokenizer_3=t5_tokenizer() if t5 else None,
    )  # fmt: skip
    pipeline.save_pretrained(path)
    return Path(path)


def flux(path: str | Path, *, seed: int = 0, guidance_embeds: bool = True, **scheduler: Any) -> Path:
    """FLUX.1-dev: one CLIP for the pooled embedding, T5 for the tokens, guidance embedding, dynamic shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guidance_embeds, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    t5_config = T5Config(vocab_size=98, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    options = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, **scheduler}
    pipeline: Any = FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(**options),
        vae=vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=CLIPTextModel(_clip_config(16, 16, 16)), tokenizer=clip_tokenizer(),
        text_encoder_2=T5EncoderModel(t5_config), tokenizer_2=t5_tokenizer(),
    )  # fmt: skip
    pipeline.save_pretrained(path)
    return Path(path)


def qwen_tokenizer(template: str) -> Any:
    """Qwen2's byte-level tokenizer without merges: every byte is a token; `template` formats a chat."""
    from transformers import Qwen2TokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate([*_symbols(), *special])}
    return Qwen2TokenizerFast(vocab=vocab, merges=[], chat_template=template, additional_special_tokens=special[1:])


QWEN3_TEMPLATE = (  # the shape of Qwen3's own, thinking switched off
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


def flux2_klein(path: str | Path, *, seed: int = 0, is_distilled: bool = False, **scheduler: Any) -> Path:
    """FLUX.2 klein: three layers of Qwen3 side by side, a VAE with a batch norm's statistics, a shift by tokens and steps.

    The layout of black-forest-labs/FLUX.2-klein-base-4B: classes of model_index.json, keys of each config. Layers 9, 18 and
    27 of the text encoder are read, so it has 28.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    encoder = Qwen3Config(
        vocab_size=259, hidden_size=8, intermediate_size=8, num_hidden_layers=28, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    options = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, **scheduler}
    pipeline: Any = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**options), vae=flux2_vae(), text_encoder=Qwen3ForCausalLM(encoder),
        tokenizer=qwen_tokenizer(QWEN3_TEMPLATE), transformer=flux2_transformer(24, False), is_distilled=is_distilled,
    )  # fmt: skip
    pipeline.save_pretrained(path)
    return Path(path)


def flux2_vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 8, 8), norm_num_groups=2, layers_per_block=1, latent_channels=4, sample_size=64,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def flux2_transformer(context: int, guidance_embeds: bool) -> Any:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=context, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip


def gemma_tokenizer() -> Any:
    """Gemma's tokenizer with bytes alone: every character falls back to its bytes."""
    from transformers import GemmaTokenizerFast

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return GemmaTokenizerFast(vocab={token: index for index, token in enumerate(tokens)}, merges=[])


def dc_ae() -> Any:
    """A DC-AE whose latents are 8 times smaller than the image."""
    from diffusers import AutoencoderDC

    sizes: dict[str, Any] = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_out_channels": (8, 8, 8, 8), "layers_per_block": (1,) * 4, "qkv_multiscales": ((),) * 4,
        }.items()
    }  # fmt: skip
    return AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=0.41, **sizes)


def sana(path: str | Path, *, seed: int = 0) -> Path:
    """Sana: Gemma 2, plain latents of a DC-AE, linear attention, a DPM-Solver over flow sigmas.

    The layout of Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers, whose latents are 32 times smaller; here 8 times.
    """
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(seed)
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8, timestep_scale=0.7,
    )  # fmt: skip
    encoder = Gemma2Config(
        vocab_size=261, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8,
    )  # fmt: skip
    pipeline: Any = SanaPipeline(
        tokenizer=gemma_tokenizer(), text_encoder=Gemma2Model(encoder), transformer=transformer,
        vae=dc_ae(),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    )  # fmt: skip
    pipeline.save_pretrained(path)
    return Path(path)


def pixart(path: str | Path, *, seed: int = 0) -> Path:
    """PixArt-Sigma: T5 with masks, a network that also predicts variances, DPM-Solver.

    The layout of PixArt-alpha/PixArt-Sigma-XL-2-1024-MS, whose index names the transformer by its former class.
    """
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=32,
        in_channels=4, cross_attention_dim=16, out_channels=8, norm_type="ada_norm_single", use_additional_conditions=False,
    )  # fmt: skip
    encoder = T5EncoderModel(T5Config(vocab_size=98, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    pipeline: Any = PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(), text_encoder=encoder, vae=vae(), transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip
    pipeline.save_pretrained(path)
    index = Path(path) / "model_index.json"
    index.write_text(index.read_text().replace('"PixArtTransformer2DModel"', '"Transformer2DModel"'))
    return Path(path)


def flux2_dev(path: str | Path, *, seed: int = 0) -> Path:
    """FLUX.2-dev: klein's layout with guidance as an input and Mistral Small, an image model, for prompts (31 layers)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        MistralConfig,
        PixtralImageProcessor,
        PixtralProcessor,
        PixtralVisionConfig,
    )

    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer("")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content[0].text }}{% endfor %}"
    processor = PixtralProcessor(PixtralImageProcessor(), tokenizer, chat_template=template)
    encoder = Mistral3Config(
        text_config=MistralConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=31, num_attention_heads=2,
            num_key_value_heads=1, head_dim=4,
        ),
        vision_config=PixtralVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4, image_size=32
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    pipeline: Any = Flux2Pipeline(
        scheduler=scheduler, vae=flux2_vae(), text_encoder=Mistral3ForConditionalGeneration(encoder),
        tokenizer=processor, transformer=flux2_transformer(24, True),
    )  # fmt: skip
    pipeline.save_pretrained(path)
    return Path(path)
