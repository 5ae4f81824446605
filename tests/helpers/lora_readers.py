"""Read LoRA files as ComfyUI, kohya's sd-scripts and A1111 do, to the change of each weight. None of their code is here.

It knows torch and safetensors alone: no diffalign, diffusers or peft. What it does follows these sources:

    ComfyUI a125cd84      comfy/lora.py (which keys a weight has), comfy/utils.py (names of diffusers' layers),
                          comfy/weight_adapter/lora.py (alpha / rank, or 1 without an alpha tensor);
                          for Z-Image and Qwen-Image the same files of 17358c8f
    sd-scripts 48d368fa   networks/lora.py, lora_sd3.py, lora_flux.py (names of modules, alpha; alpha = rank without a tensor)
    A1111 (Lora extension, as kept in ussoewwin/A1111-for-Python3.12 1fc455d5)
                          networks.py (names), network.py (alpha / rank, or 1 without an alpha tensor); SD3's names
                          from modules/models/sd3/sd3_model.py

Models are given by their weights under diffusers' names and the trunk's config, and are laid out as the original code has
them. ComfyUI takes SD3's width for 64 times its depth; here it is read from the weights, so that narrow models work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
Config = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A weight of the original code, or rows of one; `swap`: the change's halves are exchanged."""

    name: str
    start: int = 0
    swap: bool = False


@dataclass
class Reading:
    """What a program makes of a file: the change of each weight of the original code, and the keys that it does not use."""

    changes: dict[str, Tensor] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)


class Model:
    """A model in the original code: the shapes of its weights, and where diffusers' weights lie in them."""

    def __init__(self, family: str, config: Config, shapes: Shapes) -> None:
        self.family, self.config = family, config
        names = dict(LAYOUTS[family](config, shapes))
        self.targets = {name: names[name] for name in shapes if name in names}
        self.shapes: Shapes = {}
        for name, target in self.targets.items():
            rows, *rest = shapes[name]
            before = self.shapes.get(target.name, (0,))[0]
            self.shapes[target.name] = (max(before, target.start + rows), *rest)

    def place(self, out: dict[str, Tensor], target: Target, change: Tensor) -> None:
        """Add a change of some rows to that of the whole weight."""
        whole = out.setdefault(target.name, torch.zeros(self.shapes[target.name], dtype=torch.float64))
        if target.swap:
            first, second = change.chunk(2)
            change = torch.cat([second, first])
        whole[target.start : target.start + len(change)] += change.reshape(len(change), *whole.shape[1:])

    def true_changes(self, layers: dict[str, tuple[Tensor, Tensor, float]]) -> dict[str, Tensor]:
        """Return alpha / rank B A of each weight: layers by diffusers' names -> (A, B, alpha / rank)."""
        out: dict[str, Tensor] = {}
        for name, (a, b, scale) in layers.items():
            self.place(out, self.targets[f"{name}.weight"], product(b, a) * scale)
        return out


def product(up: Tensor, down: Tensor) -> Tensor:
    return up.double().flatten(1) @ down.double().flatten(1)


# --- where diffusers' weights lie: ComfyUI's unet_to_diffusers, mmdit_to_diffusers, flux_to_diffusers ------------------


def unet(config: Config, shapes: Shapes) -> Iterator[tuple[str, Target]]:
    levels = len(config["block_out_channels"])
    layers = config["layers_per_block"]
    resnet = {
        "norm1": "in_layers.0",
        "norm2": "out_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }

    def both(ours: str, theirs: str, resnets: bool) -> Iterator[tuple[str, Target]]:
        for name in shapes:
            if name.startswith(f"{ours}.") and name.endswith(".weight"):
                rest = name[len(ours) + 1 : -len(".weight")]
                yield name, Target(f"{theirs}.{resnet.get(rest, rest) if resnets else rest}.weight")

    counter = 1
    for level in range(levels):
        for i in range(layers):
            yield from both(f"down_blocks.{level}.resnets.{i}", f"input_blocks.{counter}.0", True)
            yield from both(f"down_blocks.{level}.attentions.{i}", f"input_blocks.{counter}.1", False)
            counter += 1
        yield f"down_blocks.{level}.downsamplers.0.conv.weight", Target(f"input_blocks.{counter}.0.op.weight")
        counter += 1
    yield from both("mid_block.resnets.0", "middle_block.0", True)
    yield from both("mid_block.attentions.0", "middle_block.1", False)
    yield from both("mid_block.resnets.1", "middle_block.2", True)
    counter = 0
    for level in range(levels):
        for i in range(layers + 1):
            yield from both(f"up_blocks.{level}.resnets.{i}", f"output_blocks.{counter}.0", True)
            attention = list(both(f"up_blocks.{level}.attentions.{i}", f"output_blocks.{counter}.1", False))
            yield from attention
            if i == layers:
                part = 1 + bool(attention)
                yield (
                    f"up_blocks.{level}.upsamplers.0.conv.weight",
                    Target(f"output_blocks.{counter}.{part}.conv.weight"),
                )
            counter += 1
    for theirs, ours in (
        ("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"),
        ("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2"),
        ("input_blocks.0.0", "conv_in"), ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
    ):  # fmt: skip
        yield f"{ours}.weight", Target(f"{theirs}.weight")


def qkv(ours: list[str], theirs: str, width: int) -> Iterator[tuple[str, Target]]:
    for n, name in enumerate(ours):
        yield f"{name}.weight", Target(f"{theirs}.weight", n * width)


def mmdit(config: Config, shapes: Shapes) -> Iterator[tuple[str, Target]]:
    depth, width = config["num_layers"], shapes["transformer_blocks.0.attn.to_q.weight"][0]
    for i in range(depth):
        ours, theirs = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        yield from qkv([f"{ours}.attn.to_{x}" for x in "qkv"], f"{theirs}.x_block.attn.qkv", width)
        yield from qkv([f"{ours}.attn.add_{x}_proj" for x in "qkv"], f"{theirs}.context_block.attn.qkv", width)
        yield from qkv([f"{ours}.attn2.to_{x}" for x in "qkv"], f"{theirs}.x_block.attn2.qkv", width)
        for a, b in (
            ("norm1_context.linear", "context_block.adaLN_modulation.1"), ("attn.to_add_out", "context_block.attn.proj"),
            ("ff_context.net.0.proj", "context_block.mlp.fc1"), ("ff_context.net.2", "context_block.mlp.fc2"),
            ("norm1.linear", "x_block.adaLN_modulation.1"), ("attn.to_out.0", "x_block.attn.proj"),
            ("attn2.to_out.0", "x_block.attn2.proj"), ("ff.net.0.proj", "x_block.mlp.fc1"), ("ff.net.2", "x_block.mlp.fc2"),
        ):  # fmt: skip
            swap = a == "norm1_context.linear" and i == depth - 1
            yield f"{ours}.{a}.weight", Target(f"{theirs}.{b}.weight", swap=swap)
    for b, a in (
        ("context_embedder", "context_embedder"), ("x_embedder.proj", "pos_embed.proj"), ("final_layer.linear", "proj_out"),
        ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
        ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
        ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
        ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
        ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    ):  # fmt: skip
        yield f"{a}.weight", Target(f"{b}.weight", swap=a == "norm_out.linear")


def flux(config: Config, shapes: Shapes) -> Iterator[tuple[str, Target]]:
    width = shapes["transformer_blocks.0.attn.to_q.weight"][0]
    for i in range(config["num_layers"]):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        yield from qkv([f"{ours}.attn.to_{x}" for x in "qkv"], f"{theirs}.img_attn.qkv", width)
        yield from qkv([f"{ours}.attn.add_{x}_proj" for x in "qkv"], f"{theirs}.txt_attn.qkv", width)
        for a, b in (
            ("attn.to_out.0", "img_attn.proj"), ("norm1.linear", "img_mod.lin"), ("norm1_context.linear", "txt_mod.lin"),
            ("attn.to_add_out", "txt_attn.proj"), ("ff.net.0.proj", "img_mlp.0"), ("ff.net.2", "img_mlp.2"),
            ("ff_context.net.0.proj", "txt_mlp.0"), ("ff_context.net.2", "txt_mlp.2"),
        ):  # fmt: skip
            yield f"{ours}.{a}.weight", Target(f"{theirs}.{b}.weight")
    for i in range(config["num_single_layers"]):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        yield from qkv([*(f"{ours}.attn.to_{x}" for x in "qkv"), f"{ours}.proj_mlp"], f"{theirs}.linear1", width)
        yield f"{ours}.norm.linear.weight", Target(f"{theirs}.modulation.lin.weight")
        yield f"{ours}.proj_out.weight", Target(f"{theirs}.linear2.weight")
    for b, a in (
        ("final_layer.linear", "proj_out"), ("img_in", "x_embedder"), ("txt_in", "context_embedder"),
        ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
        ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
        ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
        ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
        ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
        ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
        ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    ):  # fmt: skip
        yield f"{a}.weight", Target(f"{b}.weight", swap=a == "norm_out.linear")


def z_image(config: Config, shapes: Shapes) -> Iterator[tuple[str, Target]]:
    """z_image_to_diffusers."""
    parts = {"attention.to_out.0": "attention.out"}
    for ours in shapes:
        block, _, layer = ours.removesuffix(".weight").partition(".attention.")
        if layer in ("to_q", "to_k", "to_v"):
            start = ("to_q", "to_k", "to_v").index(layer) * config["dim"]
            yield ours, Target(f"{block}.attention.qkv.weight", start)
        elif ours.endswith(".weight"):
            name = ours.removesuffix(".weight")
            tail = next((end for end in parts if name.endswith(end)), "")
            yield ours, Target(f"{name.removesuffix(tail)}{parts.get(tail, '')}.weight")


def qwen_image(config: Config, shapes: Shapes) -> Iterator[tuple[str, Target]]:
    """Diffusers' names; of Qwen-Image-2.1 the gate lies above the input in one weight."""
    for ours in shapes:
        block, _, layer = ours.removesuffix(".weight").rpartition(".")
        if layer in ("gate_layer", "proj") and "gate_layer" in " ".join(shapes):
            start = 0 if layer == "gate_layer" else shapes[f"{block}.gate_layer.weight"][0]
            yield ours, Target(f"{block}.gate_up.weight", start)
        elif ours.endswith(".weight"):
            yield ours, Target(ours)


LAYOUTS: dict[str, Callable[[Config, Shapes], Iterator[tuple[str, Target]]]] = {
    "sd15": unet, "sdxl": unet, "sd3": mmdit, "flux": flux, "z_image": z_image,
    "qwen_image": qwen_image, "qwen_image_21": qwen_image,
}  # fmt: skip


# --- the programs ------------------------------------------------------------------------------------------------------


def comfyui(file: Path, model: Model) -> Reading:
    """load_lora over the keys of model_lora_keys_unet; an absent alpha counts as 1 for alpha / rank."""
    keys: dict[str, Target] = {}
    for name in model.shapes:
        keys[f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"] = Target(name)
        keys[f"diffusion_model.{name.removesuffix('.weight')}"] = Target(name)
    for ours, target in model.targets.items():
        plain = ours.removesuffix(".weight")
        if model.family in ("sd15", "sdxl"):
            keys[f"lora_unet_{plain.replace('.', '_')}"] = target
            for prefix in ("", "unet."):
                keys[f"{prefix}{plain.replace('.to_', '.processor.to_')}".removesuffix(".0")] = target
        else:
            keys[f"transformer.{plain}"] = target
            keys[f"lora_transformer_{plain.replace('.', '_')}"] = target
    return _read(file, model, keys, (("lora_up", "lora_down"), ("lora_B", "lora_A")))


def sd_scripts(file: Path, model: Model) -> Reading:
    """create_network_from_weights: modules below the replaced blocks only; an absent alpha counts as the rank."""
    keys: dict[str, Target] = {}
    blocks = ("joint_blocks.", "double_blocks.", "single_blocks.", "input_blocks.", "middle_block.", "output_blocks.")
    for ours, target in model.targets.items():
        if model.family == "sd15":  # its UNet has diffusers' names
            inner = ".attentions." in ours or ".resnets." in ours or "samplers." in ours
            name = ours
        else:
            inner = target.name.startswith(blocks) and not target.name.startswith("input_blocks.0.")
            name, target = target.name, Target(target.name)
        if inner:
            keys[f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"] = target
    return _read(file, model, keys, (("lora_up", "lora_down"),))


def a1111(file: Path, model: Model) -> Reading:
    """load_network and calc_updown. Of SD1.5 and SDXL kohya's files, by diffusers' or original names.

    Of SD3 it splits every key at its last two dots, so that a file with `NAME.alpha` raises an error; it knows diffusers'
    names of the image's side, and misspells those of the text's. It has no FLUX.
    """
    keys: dict[str, Target] = {}
    if model.family == "sd3" and all(key.count(".") > 1 for key in load_file(file)):
        own = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
        sides = {n: t for n, t in model.targets.items() if n.removesuffix(".weight").endswith(own) and "attn2" not in n}
        keys = {f"transformer.{name.removesuffix('.weight')}": target for name, target in sides.items()}
    for ours, target in model.targets.items():
        if model.family in ("sd15", "sdxl"):  # convert_diffusers_name_to_compvis
            keys[f"lora_unet_{target.name.removesuffix('.weight').replace('.', '_')}"] = target
            keys[f"lora_unet_{ours.removesuffix('.weight').replace('.', '_')}"] = target
    return _read(file, model, keys, (("lora_up", "lora_down"), ("lora_B", "lora_A")))


PROGRAMS: dict[str, Callable[[Path, Model], Reading]] = {"ComfyUI": comfyui, "sd-scripts": sd_scripts, "A1111": a1111}


def _read(file: Path, model: Model, keys: dict[str, Target], names: tuple[tuple[str, str], ...]) -> Reading:
    state = load_file(file)
    found = Reading(unread=set(state))
    for key, target in keys.items():
        for up, down in names:
            if f"{key}.{up}.weight" not in state:
                continue
            b, a = state[f"{key}.{up}.weight"], state[f"{key}.{down}.weight"]
            scale = float(state[f"{key}.alpha"]) / len(a) if f"{key}.alpha" in state else 1.0
            change = product(b, a) * scale
            model.place(found.changes, target, change)
            found.unread -= {f"{key}.{up}.weight", f"{key}.{down}.weight", f"{key}.alpha"}
    return found


def largest_difference(found: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """Return the largest difference of the changes over their largest value; infinite where other weights are changed."""
    if set(found) != set(true):
        return float("inf")
    top = max(float(change.abs().max()) for change in true.values())
    return max(float((found[name] - change).abs().max()) for name, change in true.items()) / top
