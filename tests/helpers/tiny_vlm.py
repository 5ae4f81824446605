"""Image-text models of a few thousand random weights, in the folders in which the real ones are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from helpers import tiny

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = ("qwen2_vl", "qwen3_vl", "qwen3_5")


def qwen_tokenizer(words: tuple[str, ...] = (), merges: tuple[tuple[str, str], ...] = ()) -> Any:
    """Every byte a token, so every digit and letter too; `words` are the results of `merges`."""
    from transformers import Qwen2Tokenizer

    vocabulary = [*tiny._symbols(), *words, "<|endoftext|>"]
    return Qwen2Tokenizer(
        vocab={w: i for i, w in enumerate(vocabulary)},
        merges=list(merges),
        unk_token=None,
        additional_special_tokens=SPECIAL,
    )


def qwen_processor(family: str, tokenizer: Any, template: str | None = TEMPLATE, largest: int = 64 * 64) -> Any:
    """The family's processor for pictures of at most `largest` pixels."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    old = family == "qwen2_vl"
    side = 14 if old else 16
    images = Qwen2VLImageProcessor(
        size={"shortest_edge": 4 * side * side, "longest_edge": max(largest, 4 * side * side)},
        patch_size=side,
        **({} if old else {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}),
    )
    kind, video = (Qwen2VLProcessor, Qwen2VLVideoProcessor) if old else (Qwen3VLProcessor, Qwen3VLVideoProcessor)
    return kind(image_processor=images, tokenizer=tokenizer, video_processor=video(), chat_template=template)


def qwen_model(family: str, tokenizer: Any, seed: int = 0, width: int = 32, noise: float = 0.05) -> Any:
    """A random model of the family: Qwen2-VL, Qwen3-VL, or Qwen3.5 with three linear layers and one of full attention.

    noise: added to every weight; with little of it the picture hardly moves the answer.
    """
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen3_5Config,
        Qwen3_5ForConditionalGeneration,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
    )

    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 8, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192, "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"], "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }  # fmt: skip
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    shared = {
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
    }  # fmt: skip
    vision: dict[str, Any] = {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "patch_size": 16, "out_hidden_size": width,
        "num_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(seed)
    model: Any
    if family == "qwen2_vl":
        text |= {"rope_parameters": rope | {"mrope_section": [width // 32, width // 32, width // 16]}}
        seen = {"depth": 1, "embed_dim": 32, "hidden_size": width, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=seen, **shared))
    elif family == "qwen3_vl":
        text |= {
            "head_dim": 8,
            "rope_parameters": rope | {"mrope_section": [2, 1, 1], "mrope_interleaved": True},
        }
        vision |= {"deepstack_visual_indexes": [0]}
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **shared))
    else:
        text |= {
            "head_dim": 16, "num_hidden_layers": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "rope_parameters": rope | {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.5},
        }  # fmt: skip
        model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision, **shared))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model.eval()


def qwen_folder(path: Path, family: str = "qwen2_vl", seed: int = 0, noise: float = 0.05, **processor: Any) -> Path:
    """Model and processor of a family on disk."""
    tokenizer = qwen_tokenizer()
    qwen_model(family, tokenizer, seed, noise=noise).save_pretrained(path)
    qwen_processor(family, tokenizer, **processor).save_pretrained(path)
    return path
