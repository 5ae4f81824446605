"""Builders of tiny, random checkpoints whose text encoders are models of the Qwen family, as `tiny` has the others.

The parts and their classes are those of the published repositories' model_index.json: Tongyi-MAI/Z-Image, Qwen/Qwen-Image and
Qwen/Qwen-Image-2.1. Schedulers have the published settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from helpers import tiny, tiny_vlm

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen3's template, without tools and thoughts."""
SHIFT: dict[str, Any] = {
    "shift": 1.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}  # fmt: skip
"""Of Qwen-Image and Qwen-Image-2.1: it depends on the size, and sampling ends at 0.02."""


def z_image(path: str | Path, *, seed: int = 0, shift: float = 6.0) -> Path:
    """Z-Image: Qwen3 for the prompt, a single stream, FLUX's VAE, a fixed shift (6 for Z-Image, 3 for Turbo)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = tiny_vlm.qwen_tokenizer()
    tokenizer.chat_template = CHAT
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 8, hidden_size=16, intermediate_size=32, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=tokenizer.pad_token_id, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    transformer = ZImageTransformer2DModel(
        dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6],
        axes_lens=[1024, 16, 16],
    )  # fmt: skip
    with torch.no_grad():  # published ones are trained, and these are zeros at first
        for parameter in (transformer.x_pad_token, transformer.cap_pad_token):
            parameter.normal_()
    pipeline: Any = ZImagePipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=tiny.vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=Qwen3Model(config), tokenizer=tokenizer,
    )  # fmt: skip
    pipeline.save_pretrained(path)
    return Path(path)


def frame_vae(**options: Any) -> Any:
    """Qwen-Image's VAE: one frame of a video, 8 pixels a cell, a mean and a deviation for each channel."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0], **options,
    )  # fmt: skip


def qwen_image(path: str | Path, *, seed: int = 0, guidance_embeds: bool = False) -> Path:
    """Qwen-Image: Qwen2.5-VL for the prompt, an MMDiT, a shift that depends on the size, an end at 0.02."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = tiny_vlm.qwen_tokenizer()
    torch.manual_seed(seed)
    text: Any = {
        "vocab_size": len(tokenizer) + 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048, "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    seen: Any = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16, "patch_size": 14,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in tiny_vlm.SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=seen, image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    pipeline: Any = QwenImagePipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(**SHIFT), vae=frame_vae(), tokenizer=tokenizer,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
    )  # fmt: skip
    pipeline.save_pretrained(path)
    return Path(path)


def qwen_image_21(path: str | Path, *, seed: int = 0, **config: Any) -> Path:
    """Qwen-Image-2.1: Qwen3-VL for the prompt, one block-causal stream, a VAE with opacity and 16 pixels a cell."""
    from diffusers import (
        AutoencoderKLQwenImage21,
        FlowMatchEulerDiscreteScheduler,
        QwenImage21Pipeline,
        QwenImage21Transformer2DModel,
    )

    tokenizer = tiny_vlm.qwen_tokenizer()
    torch.manual_seed(seed)
    transformer = QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=32,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0],
    )  # fmt: skip
    pipeline: Any = QwenImage21Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(**SHIFT), vae=vae,
        text_encoder=tiny_vlm.qwen_model("qwen3_vl", tokenizer), processor=tiny_vlm.qwen_processor("qwen3_vl", tokenizer),
        **config,
    )  # fmt: skip
    pipeline.save_pretrained(path)
    return Path(path)
