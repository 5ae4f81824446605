"""A pipeline as one checkpoint file in the layout of those who published the model, which ComfyUI and A1111 load.

diffusers reads this layout (`from_single_file`) but does not write it. Names of the trunk's layers are those of
`original_names.py`. Sources of the rest: diffusers 0.42.1 (loaders/single_file_utils.py), sd-scripts 48d368fa
(library/sdxl_model_util.py, model_util.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.pipelines.original_names import Config, Place

SINGLE_FILE = "model.safetensors"
State = dict[str, Tensor]
TRUNK = "model.diffusion_model."
VAE = "first_stage_model."


@dataclass(frozen=True)
class SingleFile:
    """How a family lies in one file: where the trunk's layers go, the prefix of each component, and what loads it.

    components: component -> (prefix, its tensors -> those of the file). Components that are not named stay out, such as the
    text encoders of a family whose file holds the trunk alone.
    """

    place: Callable[[str, Config], Place | None]
    readers: str
    trunk: str = TRUNK
    components: Mapping[str, tuple[str, Callable[[State], State]]] | None = None


def whole_state(layout: SingleFile, trunk: nn.Module, config: Config, components: Mapping[str, object]) -> State:
    """Return all tensors of a pipeline by their names in one file.

    config: the trunk's. components: the pipeline's. Raises DiffalignError for a layer that the original code lacks.
    """
    found = {
        f"{layout.trunk}{key}": value for key, value in trunk_state(trunk.state_dict(), layout.place, config).items()
    }
    for name, (prefix, convert) in (layout.components or {}).items():
        component = components.get(name)
        if isinstance(component, nn.Module):
            found |= {f"{prefix}{key}": value for key, value in convert(component.state_dict()).items()}
    return found


def trunk_state(state: Mapping[str, Tensor], place: Callable[[str, Config], Place | None], config: Config) -> State:
    """Return a trunk's tensors by their names in the original code, layers fused where they are one there."""
    found: State = {}
    fused: dict[str, list[tuple[int, Tensor]]] = {}
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        where = place(name, config)
        if where is None:
            raise DiffalignError(f"--format single-file: that layout has no name for {key}; use --format merged")
        if where.layer.endswith(("query_norm", "key_norm")):
            kind = "scale"
        target = f"{where.layer}.{kind}" if where.layer else kind
        if where.rows is not None:
            fused.setdefault(target, []).append((where.start, value))
        else:
            found[target] = torch.cat(value.chunk(2)[::-1]) if where.swapped else value
    for target, parts in fused.items():
        found[target] = torch.cat([value for _, value in sorted(parts, key=lambda part: part[0])])
    return found


# --- the other components ----------------------------------------------------------------------------------------------

VAE_NAMES = (
    (re.compile(r"\bconv_norm_out\b"), "norm_out"),
    (re.compile(r"\bdown_blocks\.(\d+)\.resnets\.(\d+)\."), r"down.\1.block.\2."),
    (re.compile(r"\bdown_blocks\.(\d+)\.downsamplers\.0\."), r"down.\1.downsample."),
    (re.compile(r"\bup_blocks\.(\d+)\.resnets\.(\d+)\."), r"up.\1.block.\2."),
    (re.compile(r"\bup_blocks\.(\d+)\.upsamplers\.0\."), r"up.\1.upsample."),
    (re.compile(r"\bmid_block\.resnets\.0\."), "mid.block_1."),
    (re.compile(r"\bmid_block\.resnets\.1\."), "mid.block_2."),
    (re.compile(r"\bconv_shortcut\b"), "nin_shortcut"),
    (re.compile(r"\bmid_block\.attentions\.0\.group_norm\."), "mid.attn_1.norm."),
    (re.compile(r"\bmid_block\.attentions\.0\.to_([qkv])\."), r"mid.attn_1.\1."),
    (re.compile(r"\bmid_block\.attentions\.0\.to_out\.0\."), "mid.attn_1.proj_out."),
)
UP = re.compile(r"\bup\.(\d+)\.")


def vae_state(state: State) -> State:
    """Return a VAE's tensors by Stability's names: up blocks are counted from the image's side, attention is convolution."""
    levels = 1 + max(int(found[1]) for key in state if (found := re.search(r"decoder\.up_blocks\.(\d+)\.", key)))
    out: State = {}
    for key, value in state.items():
        name = key
        for pattern, instead in VAE_NAMES:
            name = pattern.sub(instead, name)
        name = UP.sub(lambda found: f"up.{levels - 1 - int(found[1])}.", name)
        linear = ".mid.attn_1." in name and value.dim() == 2
        out[name] = value[:, :, None, None] if linear else value
    return out


def clip_state(state: State) -> State:
    """Return a CLIP text encoder's tensors by transformers' names, of which its version 5 left out a part."""
    inner = ("embeddings.", "encoder.", "final_layer_norm.")
    return {f"text_model.{key}" if key.startswith(inner) else key: value for key, value in state.items()}


OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def open_clip_state(state: State) -> State:
    """Return the tensors of SDXL's second text encoder by OpenCLIP's names, q, k and v in one layer."""
    out: State = {}
    state = clip_state(state)
    for key, value in state.items():
        layer = LAYER.fullmatch(key)
        if key in OPEN_CLIP:
            out[OPEN_CLIP[key]] = value
        elif key == "text_projection.weight":
            out["text_projection"] = value.T
        elif layer and layer[2] in OPEN_CLIP_LAYER:
            out[f"transformer.resblocks.{layer[1]}.{OPEN_CLIP_LAYER[layer[2]]}.{layer[3]}"] = value
        elif layer and layer[2] == "self_attn.q_proj":
            parts = [state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            out[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat(parts)
    return out


def t5_state(state: State) -> State:
    """Return T5's tensors. Its table of tokens has two names, under both of which programs look for it."""
    return {**state, "encoder.embed_tokens.weight": state["shared.weight"].clone()}
