"""Names that layers of diffusers' trunks have in the code of those who published the models.

LoRA files of kohya's trainer and checkpoints in a single file use these names. There, layers that read one input are often
one layer: q, k and v of an attention, and with them the first layer of the MLP in FLUX's single blocks. All names follow from
the model's structure, which its config states, never from the layers that a file happens to hold.

Sources: kohya-ss/sd-scripts 48d368fa (networks/lora.py, lora_sd3.py, lora_flux.py and library/*_models.py), ComfyUI a125cd84
(comfy/utils.py), diffusers 0.42.1 (loaders/single_file_utils.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
"""A trunk's config.json."""


@dataclass(frozen=True)
class Place:
    """Where a layer lies in the original code: `layer`, dotted ("" for the model itself).

    Where layers are fused there, it has the rows from `start` on of `rows`. swapped: the output's halves stand in the other
    order there (shift and scale of the last modulation).
    """

    layer: str
    start: int = 0
    rows: int | None = None
    swapped: bool = False


# --- SD1.5 and SDXL ----------------------------------------------------------------------------------------------------

UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_LAYER = re.compile(
    r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def unet_place(name: str, config: Config) -> Place | None:
    """Place a layer of a UNet in Stability's code, which numbers its blocks through; None for a layer that it lacks.

    Block 0 is the first convolution. Then each resnet with the attention behind it is a block, and so is a downsampler. An up
    block has one resnet more than its down block, and its upsampler stands in the block of the last one.
    """
    if name in UNET:
        return Place(UNET[name])
    found = UNET_LAYER.fullmatch(name)
    if found is None:
        return None
    side, block, kind, number, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        rest = RESNET.get(rest, "")
    if not rest:
        return None
    if side == "mid_block":
        return Place(f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}")
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    counts = [layers] * levels if isinstance(layers, int) else list(layers)
    if side == "down_blocks":
        first = 1 + sum(n + 1 for n in counts[:block])
        if kind == "downsamplers":
            return Place(f"input_blocks.{first + counts[block]}.0.op")
        return Place(f"input_blocks.{first + number}.{int(kind == 'attentions')}.{rest}")
    counts.reverse()
    first = sum(n + 1 for n in counts[:block])
    if kind == "upsamplers":
        behind = 2 if "CrossAttn" in config["up_block_types"][block] else 1
        return Place(f"output_blocks.{first + counts[block]}.{behind}.conv")
    return Place(f"output_blocks.{first + number}.{int(kind == 'attentions')}.{rest}")


# --- SD3 and FLUX ------------------------------------------------------------------------------------------------------

SD3 = {
    "pos_embed": "",  # the table of positions has no layer
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
SD3_QKV = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}
FLUX = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
FLUX_BLOCK = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
FLUX_QKV = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
FLUX_SINGLE = {
    "norm.linear": "modulation.lin",
    "proj_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
FLUX_LINEAR1 = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}
FLUX2 = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
FLUX2_BLOCK = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
FLUX2_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
BLOCK = re.compile(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.(.+)")


def sd3_place(name: str, config: Config) -> Place | None:
    """Place a layer of SD3's or SD3.5's transformer in Stability's code; None for a layer that it lacks."""
    if name in SD3:
        return Place(SD3[name], swapped=name == "norm_out.linear")
    found = BLOCK.fullmatch(name)
    if found is None:
        return None
    block, rest = int(found[2]), found[3]
    place = _of_block(f"joint_blocks.{block}", rest, SD3_BLOCK, SD3_QKV, config)
    # The context of the last block is only read: its modulation has shift and scale alone.
    last = rest == "norm1_context.linear" and block == config["num_layers"] - 1
    return Place(place.layer, swapped=True) if place and last else place


def flux_place(name: str, config: Config) -> Place | None:
    """Place a layer of FLUX's transformer in the code of Black Forest Labs; None for a layer that it lacks."""
    return _in_double_or_single(name, config, FLUX, FLUX_BLOCK, FLUX_SINGLE, FLUX_LINEAR1)


def flux2_place(name: str, config: Config) -> Place | None:
    """Place a layer of FLUX.2's transformer in the code of Black Forest Labs; None for a layer that it lacks."""
    return _in_double_or_single(name, config, FLUX2, FLUX2_BLOCK, FLUX2_SINGLE, {})


def _in_double_or_single(
    name: str,
    config: Config,
    outside: Mapping[str, str],
    double: Mapping[str, str],
    single: Mapping[str, str],
    fused_in_single: Mapping[str, tuple[str, ...]],
) -> Place | None:
    """Place a layer by the names of those outside the blocks, in double and in single blocks."""
    if name in outside:
        return Place(outside[name], swapped=name == "norm_out.linear")
    found = BLOCK.fullmatch(name)
    if found is None:
        return None
    if found[1] == "single_transformer_blocks":
        return _of_block(f"single_blocks.{found[2]}", found[3], single, fused_in_single, config)
    return _of_block(f"double_blocks.{found[2]}", found[3], double, FLUX_QKV, config)


def _of_block(
    block: str, rest: str, whole: Mapping[str, str], fused: Mapping[str, tuple[str, ...]], config: Config
) -> Place | None:
    """Place a layer inside a transformer's block: `whole` layers, or parts of `fused` ones."""
    if rest in whole:
        return Place(f"{block}.{whole[rest]}")
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    for layer, parts in fused.items():
        if rest in parts:
            sizes = [4 * width if part == "proj_mlp" else width for part in parts]
            return Place(f"{block}.{layer}", sum(sizes[: parts.index(rest)]), sum(sizes))
    return None
