"""Write the weights of a diffusers pipeline in one file, under the names of CompVis', Stability's and OpenCLIP's code.

Written from those layouts, without diffusers' loaders; everything is renamed, cut or joined, and nothing computed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip


def renamed(state: State, names: dict[str, str]) -> State:
    """Replace the beginnings of names, the longest that fits; every name must have one."""
    found = {}
    for key, value in state.items():
        old = max((n for n in names if key.startswith(n)), key=len)
        found[names[old] + key.removeprefix(old)] = value
    return found


def unet(model: Any) -> State:
    """CompVis' UNet: blocks numbered through, the attention behind each resnet."""
    layers, down, up = model.config.layers_per_block, model.config.down_block_types, model.config.up_block_types
    names = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2", "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
    }  # fmt: skip
    for i in range(len(down)):
        for j in range(layers):
            names[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{(layers + 1) * i + j + 1}.0"
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{(layers + 1) * i + j + 1}.1"
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(layers + 1) * (i + 1)}.0.op"
    for i, kind in enumerate(up):
        for j in range(layers + 1):
            names[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{(layers + 1) * i + j}.0"
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{(layers + 1) * i + j}.1"
        place = 2 if "Attn" in kind else 1
        names[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{(layers + 1) * i + layers}.{place}"
    found = {}
    for key, value in renamed(model.state_dict(), names).items():
        if any(f".{old}." in key for old in RESNET) and "transformer_blocks" not in key:
            key = next(key.replace(f".{old}.", f".{new}.") for old, new in RESNET.items() if f".{old}." in key)
        found[key] = value
    return found


def vae(model: Any) -> State:
    """CompVis' autoencoder: 1x1 convolutions for attention, the decoder's blocks counted from the other end."""
    count = len(model.config.block_out_channels)
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        names |= {f"{side}.{n}": f"{side}.{o}" for n, o in (("conv_in", "conv_in"), ("conv_out", "conv_out"),
                  ("conv_norm_out", "norm_out"), ("mid_block.attentions.0", "mid.attn_1"),
                  ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"))}  # fmt: skip
    for i in range(count):
        for j in range(model.config.layers_per_block + 1):
            names[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
            names[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{count - 1 - i}.block.{j}"
        names[f"encoder.down_blocks.{i}.downsamplers.0"] = f"encoder.down.{i}.downsample"
        names[f"decoder.up_blocks.{i}.upsamplers.0"] = f"decoder.up.{count - 1 - i}.upsample"
    attention = {
        ".group_norm.": ".norm.",
        ".to_q.": ".q.",
        ".to_k.": ".k.",
        ".to_v.": ".v.",
        ".to_out.0.": ".proj_out.",
    }
    found = {}
    for key, value in renamed(model.state_dict(), names).items():
        if ".attn_1." in key:
            for old, new in attention.items():
                key = key.replace(old, new)
            value = value[:, :, None, None] if value.ndim == 2 else value
        found[key.replace(".conv_shortcut.", ".nin_shortcut.")] = value
    return found


def clip(model: Any) -> State:
    """transformers' own CLIP, whose names begin with text_model."""
    outside = ("text_model.", "text_projection.")
    return {k if k.startswith(outside) else f"text_model.{k}": v for k, v in model.state_dict().items()}


def open_clip(model: Any) -> State:
    """OpenCLIP's text tower: q, k and v in one matrix, the projection transposed."""
    state, found = clip(model), {}
    found["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    found["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    found["text_projection"] = state["text_projection.weight"].T
    found["logit_scale"] = torch.tensor(4.6)
    for part in ("weight", "bias"):
        found[f"ln_final.{part}"] = state[f"text_model.final_layer_norm.{part}"]
        for n in range(model.config.num_hidden_layers):
            old, new = f"text_model.encoder.layers.{n}", f"transformer.resblocks.{n}"
            found[f"{new}.attn.in_proj_{part}"] = torch.cat([state[f"{old}.self_attn.{x}_proj.{part}"] for x in "qkv"])
            for a, b in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                         ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):  # fmt: skip
                found[f"{new}.{b}.{part}"] = state[f"{old}.{a}.{part}"]
    return found


def sd3(model: Any) -> State:
    """Stability's MMDiT: q, k and v in one matrix; shift before scale in the modulations that end a stream."""

    def swapped(value: Tensor) -> Tensor:
        return torch.cat(value.chunk(2)[::-1])

    state, found = model.state_dict(), {}
    found["pos_embed"] = state["pos_embed.pos_embed"]
    for part in ("weight", "bias"):
        for old, new in (("pos_embed.proj", "x_embedder.proj"), ("context_embedder", "context_embedder"),
                         ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
                         ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
                         ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
                         ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
                         ("proj_out", "final_layer.linear")):  # fmt: skip
            found[f"{new}.{part}"] = state[f"{old}.{part}"]
        found[f"final_layer.adaLN_modulation.1.{part}"] = swapped(state[f"norm_out.linear.{part}"])
        for n in range(model.config.num_layers):
            old, new, last = f"transformer_blocks.{n}", f"joint_blocks.{n}", n == model.config.num_layers - 1
            sides = (("x_block", "to_{}", "to_out.0", "norm1", "ff"),
                     ("context_block", "add_{}_proj", "to_add_out", "norm1_context", "ff_context"))  # fmt: skip
            for side, qkv, out, norm, ff in sides:
                joined = [state[f"{old}.attn.{qkv.format(x)}.{part}"] for x in "qkv"]
                found[f"{new}.{side}.attn.qkv.{part}"] = torch.cat(joined)
                modulation, end = state[f"{old}.{norm}.linear.{part}"], last and side == "context_block"
                found[f"{new}.{side}.adaLN_modulation.1.{part}"] = swapped(modulation) if end else modulation
                if not end:
                    found[f"{new}.{side}.attn.proj.{part}"] = state[f"{old}.attn.{out}.{part}"]
                    found[f"{new}.{side}.mlp.fc1.{part}"] = state[f"{old}.{ff}.net.0.proj.{part}"]
                    found[f"{new}.{side}.mlp.fc2.{part}"] = state[f"{old}.{ff}.net.2.{part}"]
    return found


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def whole(pipeline: Any) -> State:
    """All networks of an SD1.x, SDXL or SD3 pipeline under the names of their original code."""
    state = under("first_stage_model.", vae(pipeline.vae))
    kind = type(pipeline).__name__
    if kind == "StableDiffusion3Pipeline":
        state |= under("model.diffusion_model.", sd3(pipeline.transformer))
        first = {k: v for k, v in clip(pipeline.text_encoder).items() if not k.startswith("text_projection")}
        state |= under("text_encoders.clip_l.transformer.", first)
        state |= under("text_encoders.clip_g.transformer.", clip(pipeline.text_encoder_2))
        if pipeline.text_encoder_3 is not None:
            state |= under("text_encoders.t5xxl.transformer.", pipeline.text_encoder_3.state_dict())
        return state
    state |= under("model.diffusion_model.", unet(pipeline.unet))
    if kind == "StableDiffusionPipeline":
        return state | under("cond_stage_model.transformer.", clip(pipeline.text_encoder))
    state |= under("conditioner.embedders.0.transformer.", clip(pipeline.text_encoder))
    return state | under("conditioner.embedders.1.model.", open_clip(pipeline.text_encoder_2))


def write(path: Path, state: State) -> Path:
    """Write the state in a file, each tensor with memory of its own."""
    save_file({key: value.detach().clone().contiguous() for key, value in state.items()}, path)
    return path
