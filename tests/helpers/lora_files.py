"""Write LoRAs as other programs do, without diffusers or peft, and add them to a model's weights by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffalign.pipelines import Backbone, load_backbone

Deltas = dict[str, tuple[Tensor, Tensor, float]]
"""Down, up and strength of each layer of the trunk."""

UNET = (
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_v",
    "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
)
CONVOLUTIONS = ("down_blocks.0.resnets.0.conv1", "up_blocks.0.attentions.0.proj_in")
SD3 = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.add_v_proj", "transformer_blocks.0.ff.net.2")
SGM = {
    "down_blocks.1.attentions.0": "input_blocks_3_1",
    "mid_block.attentions.0": "middle_block_1",
    "up_blocks.0.attentions.0": "output_blocks_0_1",
    "up_blocks.0.attentions.1": "output_blocks_1_1",
}
"""Stability's numbers of the blocks of the tiny SDXL: one resnet a block, and a downsampler behind the first."""


@cache
def shared(folder: Path) -> Backbone:
    """A model that several tests use: each loads its own LoRA, in place of the last one."""
    return load_backbone(folder)


@cache
def untouched(folder: Path) -> Backbone:
    """A model without a LoRA, whose weights `merged` changes and restores."""
    return load_backbone(folder)


def deltas(
    backbone: Backbone, names: tuple[str, ...], alphas: tuple[float, ...], ranks: tuple[int, ...] = (2,)
) -> Deltas:
    """Random matrices of about the size of the weights; alphas and ranks are used in turn."""
    generator = torch.Generator().manual_seed(7)
    found: Deltas = {}
    for n, name in enumerate(names):
        weight = backbone.trunk.get_submodule(name).weight
        rank = ranks[n % len(ranks)]
        down = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.3
        up = torch.randn(weight.shape[0], rank, *(1 for _ in weight.shape[2:]), generator=generator) * 0.3
        found[name] = (down, up, alphas[n % len(alphas)] / rank)
    return found


def predict(backbone: Backbone) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn(2, backbone.latent_channels, 8, 8, generator=generator)
    with torch.no_grad():
        return backbone.predict(noisy, torch.full((2,), 400.0), backbone.encode_prompts(["a cat", "two dogs"]))


def merged(folder: Path, layers: Deltas) -> Tensor:
    """What the model predicts with the LoRA added to its weights by hand."""
    backbone = untouched(folder)
    before, kept = predict(backbone), {}
    with torch.no_grad():
        for name, (down, up, strength) in layers.items():
            weight = backbone.trunk.get_submodule(name).weight
            kept[name] = weight.clone()
            weight += strength * (up.flatten(1) @ down.flatten(1)).view_as(weight)
        after = predict(backbone)
        for name, weight in kept.items():
            backbone.trunk.get_submodule(name).weight.copy_(weight)
    assert (after - before).abs().max() > 0.02
    return after


def kohya(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


def sgm(name: str) -> str:
    block = next(block for block in SGM if name.startswith(block))
    return f"lora_unet_{SGM[block]}{name.removeprefix(block).replace('.', '_')}"


def as_kohya(layers: Deltas, rename: Callable[[str], str] = kohya) -> dict[str, Tensor]:
    state = {}
    for name, (down, up, strength) in layers.items():
        state |= {f"{rename(name)}.lora_down.weight": down, f"{rename(name)}.lora_up.weight": up}
        state[f"{rename(name)}.alpha"] = torch.tensor(strength * len(down))
    return state


def as_peft(
    layers: Deltas, prefix: str, ends: tuple[str, str] = (".lora_A.weight", ".lora_B.weight")
) -> dict[str, Tensor]:
    return {f"{prefix}{n}{end}": t for n, pair in layers.items() for end, t in zip(ends, pair[:2], strict=True)}


def write(
    folder: Path, state: dict[str, Tensor], name: str = "pytorch_lora_weights.safetensors", **metadata: object
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    save_file({k: v.clone() for k, v in state.items()}, folder / name, metadata=text or None)
    return folder


def peft_folder(folder: Path, layers: Deltas, prefix: str = "base_model.model.", **config: object) -> Path:
    write(folder, as_peft(layers, prefix), "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "bias": "none", "target_modules": ["to_q"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(plain))
    return folder


def former(layers: Deltas) -> dict[str, Tensor]:
    """The names of diffusers' first trainers: `attn1.processor.to_q_lora.down.weight`, and `to_out_lora` without a number."""
    state = {}
    for name, (down, up, _) in layers.items():
        block, _, last = name.removesuffix(".0").rpartition(".")
        state |= {f"unet.{block}.processor.{last}_lora.{k}.weight": t for k, t in (("down", down), ("up", up))}
    return state
