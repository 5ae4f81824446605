"""Reward models of a few thousand random weights, saved in the layouts in which the real ones are published."""

from __future__ import annotations

import json
from pathlib import Path

import tiny
import torch
from torch import nn


def randomise(module: nn.Module, seed: int, scale: float = 0.08) -> None:
    """Every parameter, norms and biases included: a port that forgets one must show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def clip_folder(path: Path, seed: int = 0, activation: str = "quick_gelu") -> Path:
    """A CLIPModel folder for 224 px with its tokenizer. eos_token_id 2 is what OpenAI's and LAION's configs say."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = tiny.clip_tokenizer(77)
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(seed)
    model = CLIPModel(
        CLIPConfig(
            text_config={
                **shared, "vocab_size": len(tokenizer), "max_position_embeddings": 77, "hidden_act": activation,
                "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1,
            },
            vision_config={**shared, "image_size": 224, "patch_size": 32, "hidden_act": activation},
            projection_dim=24,
        )
    )  # fmt: skip
    randomise(model, seed)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def hps_checkpoint(folder: Path, seed: int = 0) -> tuple[Path, dict[str, torch.Tensor]]:
    """A small open_clip config under the name `tiny-hps` and a checkpoint as xswu/HPSv2 publishes it."""
    import open_clip

    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 224, "layers": 2, "width": 32, "head_width": 8, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-hps.json")
    torch.manual_seed(seed)
    model = open_clip.create_model("tiny-hps", pretrained=None)
    randomise(model, seed)
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    path = folder / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": state}, path)
    return path, state


def aesthetic_head(path: Path, width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """`sac+logos+ava1-l14-linearMSE.pth`: layers.0, 2, 4, 6, 7."""
    return _head(path, width, seed, "layers.")


def _head(path: Path | None, width: int, seed: int, prefix: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for place, size in zip((0, 2, 4, 6, 7), (1024, 128, 64, 16, 1), strict=True):
        state[f"{prefix}{place}.weight"] = torch.randn(size, width, generator=generator) / width**0.5
        state[f"{prefix}{place}.bias"] = torch.randn(size, generator=generator) * 0.1
        width = size
    if path is not None:
        torch.save(state, path)
    return state


def imagereward_checkpoint(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """`ImageReward.pt` under BLIP's own names (ViT 64 wide, BERT 64 wide, 2 layers each), and a BERT tokenizer beside it."""
    generator = torch.Generator().manual_seed(seed)
    width, text, layers, inner = 64, 64, 2, 128
    state: dict[str, torch.Tensor] = {}

    def linear(name: str, out: int, into: int) -> None:
        state[f"{name}.weight"] = torch.randn(out, into, generator=generator) / into**0.5
        state[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.1

    def norm(name: str, size: int) -> None:
        state[f"{name}.weight"] = 1 + torch.randn(size, generator=generator) * 0.1
        state[f"{name}.bias"] = torch.randn(size, generator=generator) * 0.1

    vision = "blip.visual_encoder"
    state[f"{vision}.cls_token"] = torch.randn(1, 1, width, generator=generator)
    state[f"{vision}.pos_embed"] = torch.randn(1, 1 + 7 * 7, width, generator=generator) * 0.5
    state[f"{vision}.patch_embed.proj.weight"] = torch.randn(width, 3, 32, 32, generator=generator) / 55
    state[f"{vision}.patch_embed.proj.bias"] = torch.randn(width, generator=generator) * 0.1
    for n in range(layers):
        block = f"{vision}.blocks.{n}"
        norm(f"{block}.norm1", width)
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.mlp.fc1", inner, width)
        linear(f"{block}.mlp.fc2", width, inner)
    norm(f"{vision}.norm", width)

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), "cat", "dog", "red"]
    embeddings = "blip.text_encoder.embeddings"
    state[f"{embeddings}.word_embeddings.weight"] = torch.randn(len(words) + 2, text, generator=generator)
    state[f"{embeddings}.position_embeddings.weight"] = torch.randn(64, text, generator=generator)
    state[f"{embeddings}.position_ids"] = torch.arange(64)[None]
    norm(f"{embeddings}.LayerNorm", text)
    for n in range(layers):
        layer = f"blip.text_encoder.encoder.layer.{n}"
        for attention, into in (("attention", text), ("crossattention", width)):
            linear(f"{layer}.{attention}.self.query", text, text)
            linear(f"{layer}.{attention}.self.key", text, into)
            linear(f"{layer}.{attention}.self.value", text, into)
            linear(f"{layer}.{attention}.output.dense", text, text)
            norm(f"{layer}.{attention}.output.LayerNorm", text)
        linear(f"{layer}.intermediate.dense", inner, text)
        linear(f"{layer}.output.dense", text, inner)
        norm(f"{layer}.output.LayerNorm", text)
    linear("blip.vision_proj", 16, width)
    linear("blip.text_proj", 16, text)
    state |= _head(None, text, seed, "mlp.layers.")
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "ImageReward.pt")
    from transformers import BertTokenizer

    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return state
