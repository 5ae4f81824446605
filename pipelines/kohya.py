"""A LoRA in the layout of kohya's trainer (sd-scripts), which ComfyUI, A1111, Forge and diffusers read as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.pipelines.original_names import Config, Place

KOHYA_FILE = "kohya_lora.safetensors"


@dataclass(frozen=True)
class KohyaLayout:
    """What kohya's trainer writes for a family: names of the base model and of its network's module, and of the layers."""

    base: str
    network: str
    place: Callable[[str, Config], Place | None]


def diffusers_place(name: str, config: Config) -> Place:
    """Place a layer under diffusers' own name, as kohya's trainer has it for SD1.5."""
    return Place(name)


def to_kohya(
    state: Mapping[str, Tensor], scale: float, place: Callable[[str, Config], Place | None], config: Config
) -> dict[str, Tensor]:
    """Return a LoRA's tensors in kohya's layout.

    state: NAME.lora_A.weight [rank, in, ...] and NAME.lora_B.weight [out, rank, ...] by diffusers' names of the layers, as
    trained. scale: alpha / rank. config: the trunk's. A layer LAYER of the original code gets lora_unet_LAYER.lora_down.weight,
    .lora_up.weight and .alpha. Adapters of layers that are fused there become one, of their summed rank: downs one below the
    other, ups on the diagonal, at their rows. Raises DiffalignError for a layer that the original code lacks.
    """
    found: list[tuple[Place, Tensor, Tensor]] = []
    for key in state:
        name, _, kind = key.removesuffix(".weight").rpartition(".")
        if kind == "lora_B":
            continue
        where = place(name, config) if kind == "lora_A" else None
        if where is None:
            raise DiffalignError(f"--format kohya: that layout has no name for {key}; use --format diffusers or merged")
        found.append((where, state[key], state[f"{name}.lora_B.weight"]))
    found.sort(key=lambda one: (one[0].layer, one[0].start))
    out: dict[str, Tensor] = {}
    for layer, parts in groupby(found, key=lambda one: one[0].layer):
        down, up = _fused(list(parts))
        stem = f"lora_unet_{layer.replace('.', '_')}"
        out[f"{stem}.lora_down.weight"], out[f"{stem}.lora_up.weight"] = down.contiguous(), up.contiguous()
        out[f"{stem}.alpha"] = torch.tensor(float(scale * len(down)))
    return out


def from_kohya(
    state: Mapping[str, Tensor],
    place: Callable[[str, Config], Place | None],
    outputs: Mapping[str, int],
    config: Config,
) -> dict[str, Tensor]:
    """Undo `to_kohya`: return the matrices under diffusers' names. What has no place in the trunk keeps its name.

    outputs: how many values each of the trunk's layers gives. Parts of a fused layer share its down matrix.
    """
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, rows in outputs.items():
        where = place(name, config)
        stem = "" if where is None else f"lora_unet_{where.layer.replace('.', '_')}"
        keys = f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"
        if where is None or any(key not in state for key in keys):
            continue
        down, up = (state[key] for key in keys)
        if where.rows is not None and len(up) != where.rows:
            continue
        if where.swapped:
            up = torch.cat(up.chunk(2)[::-1])
        elif where.rows is not None:
            up = up[where.start : where.start + rows]
        found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        used |= {*keys}
    return found | {key: value for key, value in state.items() if key not in used}


def _fused(parts: list[tuple[Place, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return down and up of one layer of the original code from the adapters that lie in it."""
    first, down, up = parts[0]
    if first.swapped:
        return down, torch.cat(up.chunk(2)[::-1])
    if first.rows is None:
        return down, up
    whole = up.new_zeros(first.rows, sum(len(down) for _, down, _ in parts))
    column = 0
    for where, down, up in parts:
        whole[where.start : where.start + len(up), column : column + len(down)] = up
        column += len(down)
    return torch.cat([down for _, down, _ in parts]), whole
