"""Reward models of a few thousand random weights, saved in the layouts in which the real ones are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers import tiny

HPS = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 32, "head_width": 8, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}
"""ViT-H-14's layout, reduced."""
IMAGEREWARD = {"width": 128, "text": 128, "layers": 2, "vocabulary": 62}
"""Sizes of `imagereward_checkpoint`."""


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


def openclip_model(folder: Path, name: str, seed: int = 0, **more: bool) -> nn.Module:
    """open_clip's own CLIP of the sizes HPS, with random weights; its config is known under `name` from now on."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**HPS, **more}))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(seed)
    model = open_clip.create_model(name, pretrained=None).eval()
    randomise(model, seed)
    return model


def hps_checkpoint(folder: Path, seed: int = 0) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint as xswu/HPSv2 publishes it, in float16, of the open_clip config `tiny-hps`; its values in float32."""
    model = openclip_model(folder, "tiny-hps", seed)
    state = {k: v.detach().half() for k, v in model.state_dict().items()}
    path = folder / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": state}, path)
    return path, {k: v.float() for k, v in state.items()}


def as_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's names to those of transformers' CLIPModel: another implementation of the same network."""
    found = {"logit_scale": state["logit_scale"]}
    pairs = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
    }
    found |= {new: state[old] for old, new in pairs.items()}
    found |= {"visual_projection.weight": state["visual.proj"].T, "text_projection.weight": state["text_projection"].T}
    for old, new in (("visual.ln_pre", "vision_model.pre_layrnorm"), ("visual.ln_post", "vision_model.post_layernorm"),
                     ("ln_final", "text_model.final_layer_norm")):  # fmt: skip
        found |= {f"{new}.{part}": state[f"{old}.{part}"] for part in ("weight", "bias")}
    for old, new in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
        for n in range(2):
            a, b = f"{old}.resblocks.{n}", f"{new}.encoder.layers.{n}"
            for part in ("weight", "bias"):
                qkv = state[f"{a}.attn.in_proj_{part}"].chunk(3)
                found |= {f"{b}.self_attn.{x}_proj.{part}": v for x, v in zip("qkv", qkv, strict=True)}
                found[f"{b}.self_attn.out_proj.{part}"] = state[f"{a}.attn.out_proj.{part}"]
                for i in (1, 2):
                    found[f"{b}.layer_norm{i}.{part}"] = state[f"{a}.ln_{i}.{part}"]
                found[f"{b}.mlp.fc1.{part}"] = state[f"{a}.mlp.c_fc.{part}"]
                found[f"{b}.mlp.fc2.{part}"] = state[f"{a}.mlp.c_proj.{part}"]
    return found


def openclip_as_folder(model: nn.Module, path: Path, activation: str) -> Path:
    """The weights of `openclip_model` as a CLIPModel folder, with CLIP's real vocabulary, as OpenAI's hub folders have it."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    shared: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    shared |= {"hidden_act": activation}
    copy = CLIPModel(
        CLIPConfig(
            text_config={**shared, "vocab_size": 49408, "eos_token_id": 2},
            vision_config={**shared, "image_size": 224, "patch_size": 32},
            projection_dim=24,
        )
    )
    missing, extra = copy.load_state_dict(as_transformers(dict(model.state_dict())), strict=False)
    assert not extra and all(m.endswith("position_ids") for m in missing)
    copy.save_pretrained(path)
    words = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(word, word): i for word, i in words.encoder.items()}
    CLIPTokenizer(vocab=vocabulary, merges=list(words.bpe_ranks), model_max_length=77).save_pretrained(path)
    return path


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
    """`ImageReward.pt` under BLIP's own names (both networks 128 wide, 2 heads, 2 layers), and a BERT tokenizer beside it."""
    generator = torch.Generator().manual_seed(seed)
    width, text, layers = IMAGEREWARD["width"], IMAGEREWARD["text"], IMAGEREWARD["layers"]
    state: dict[str, torch.Tensor] = {}

    def linear(name: str, out: int, into: int) -> None:
        state[f"{name}.weight"] = torch.randn(out, into, generator=generator) / into**0.5
        state[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.1

    def norm(name: str, size: int) -> None:
        state[f"{name}.weight"] = 1 + torch.randn(size, generator=generator) * 0.1
        state[f"{name}.bias"] = torch.randn(size, generator=generator) * 0.1

    vision = "blip.visual_encoder"
    state[f"{vision}.cls_token"] = torch.randn(1, 1, width, generator=generator)
    state[f"{vision}.pos_embed"] = torch.randn(1, 1 + 14 * 14, width, generator=generator) * 0.5
    state[f"{vision}.patch_embed.proj.weight"] = torch.randn(width, 3, 16, 16, generator=generator) / 28
    state[f"{vision}.patch_embed.proj.bias"] = torch.randn(width, generator=generator) * 0.1
    for n in range(layers):
        block = f"{vision}.blocks.{n}"
        norm(f"{block}.norm1", width)
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.mlp.fc1", 4 * width, width)
        linear(f"{block}.mlp.fc2", width, 4 * width)
    norm(f"{vision}.norm", width)

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), "cat", "dog", "red"]
    assert len(words) + 2 == IMAGEREWARD["vocabulary"]  # [DEC] and [ENC], which the score never sees
    embeddings = "blip.text_encoder.embeddings"
    state[f"{embeddings}.word_embeddings.weight"] = torch.randn(IMAGEREWARD["vocabulary"], text, generator=generator)
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
        linear(f"{layer}.intermediate.dense", 2 * text, text)
        linear(f"{layer}.output.dense", text, 2 * text)
        norm(f"{layer}.output.LayerNorm", text)
    linear("blip.vision_proj", 256, width)
    linear("blip.text_proj", 256, text)
    state |= _head(None, text, seed, "mlp.layers.")
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "ImageReward.pt")
    from transformers import BertTokenizer

    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return state
