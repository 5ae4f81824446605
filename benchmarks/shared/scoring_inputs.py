"""Make what scoring is measured on: pictures as JPEG files, and a random CLIP with CLIP's own tokenizer."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

BASES = 64


def jpeg_pictures(folder: Path, count: int, side: int) -> None:
    """Write smooth pictures with a little noise, JPEG at quality 90: what a diffusion model's samples weigh.

    BASES of them are drawn; the others are copies with a comment of their own, so that every file is another one to score.
    """
    folder.mkdir()
    y, x = np.mgrid[0:side, 0:side] / side
    bases = []
    for i in range(min(count, BASES)):
        rng = np.random.default_rng(i)
        waves = [np.sin(rng.uniform(2, 20) * x + rng.uniform(2, 20) * y + rng.uniform(0, 6)) for _ in range(3)]
        pixels = np.clip(128 + 90 * np.stack(waves, -1) + rng.normal(0, 6, (side, side, 3)), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        bases.append(buffer.getvalue())
    for i in range(count):
        start, rest = bases[i % BASES][:2], bases[i % BASES][2:]
        comment = f"picture {i:06d}".encode()
        data = start + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + rest
        (folder / f"{i:06d}.jpg").write_bytes(data)


def random_clip(folder: Path, layers: int = 12, width: int = 384) -> Path:
    """Write a random CLIP, by default of ViT-S/32's sizes, with CLIP's tokenizer, as a hub folder; return the folder."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    shared = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    shared |= {"num_attention_heads": max(1, width // 64)}
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(
            text_config={**shared, "vocab_size": 49408, "eos_token_id": 2},
            vision_config={**shared, "image_size": 224, "patch_size": 32},
            projection_dim=256,
        )
    ).save_pretrained(folder)
    words = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(word, word): i for word, i in words.encoder.items()}
    CLIPTokenizer(vocab=vocabulary, merges=list(words.bpe_ranks), model_max_length=77).save_pretrained(folder)
    return folder
