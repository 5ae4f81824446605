"""The LoRA file that a run writes: diffusers' layout, the strength in the weights, and equal bytes for equal weights.

A LoRA adds alpha / rank B A to a weight. diffusers reads alpha from the file's metadata. ComfyUI, and diffusers before it had
metadata, take 1 for alpha / rank where no tensor says more, and this layout has no such tensor. So B is written times
alpha / rank and the metadata says alpha = rank: every reader then adds the same. `trained_alpha` in the metadata is the alpha
of the training, by which `as_trained` divides again. That is exact for a power of 2, else to float32's last bit.

safetensors writes metadata in another order each time. `write_tensors` sorts them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.files import replacing

RANK, ALPHA = "trained_rank", "trained_alpha"
LORA_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps the config of a LoRA."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes follow from its content. The file appears when it is complete."""
    from safetensors.torch import save

    raw = save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})
    size = int.from_bytes(raw[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(raw[8 : 8 + size])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(raw)[8 + size :])


def write_lora(
    path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], scales: Mapping[str, float], trunk_name: str
) -> None:
    """Write a LoRA in diffusers' layout.

    state: its tensors as trained, by diffusers' names without the trunk's. config: peft's. scales: alpha / rank of each layer.
    """
    from peft import LoraConfig

    folded = {
        f"{trunk_name}.{name}": value * scales[name.rpartition(".lora_B.")[0]] if ".lora_B." in name else value
        for name, value in state.items()
    }
    # With alpha = rank in every layer, also where the ranks differ. A key at peft's default is left out, since an older peft
    # may not know it. Sets are sorted: their order would follow the process's hash seed.
    plain = {**config, "lora_alpha": config["r"], "alpha_pattern": config["rank_pattern"], "use_rslora": False}
    unsaid = {**LoraConfig().to_dict(), "r": None, "lora_alpha": None}
    kept = {
        f"{trunk_name}.{key}": sorted(value) if isinstance(value, set | list) else value
        for key, value in plain.items()
        if key not in ("peft_type", "peft_version", "inference_mode") and value != unsaid.get(key)
    }
    metadata = {"format": "pt", LORA_METADATA: json.dumps(kept, sort_keys=True)}
    if len(set(scales.values())) == 1 and not config["rank_pattern"]:
        trained = next(iter(scales.values())) * config["r"] if config["use_rslora"] else config["lora_alpha"]
        metadata |= {RANK: str(config["r"]), ALPHA: json.dumps(float(trained))}
    write_tensors(path, folded, metadata)


def as_trained(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[dict[str, Tensor], float | None]:
    """Return the tensors and alpha as they were trained, from a file's tensors and metadata.

    Another program's file is returned as it is, with None for alpha. Raises ValueError for damaged metadata.
    """
    if ALPHA not in metadata:
        return dict(state), None
    scale = trained_scale(metadata)
    return {key: value / scale if ".lora_B." in key else value for key, value in state.items()}, float(metadata[ALPHA])


def as_written(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Return tensors that were trained as a file with this metadata holds them: undo `as_trained`."""
    scale = trained_scale(metadata)
    return {key: value * scale if ".lora_B." in key else value for key, value in state.items()}


def trained_scale(metadata: Mapping[str, str]) -> float:
    """Return the alpha / rank that is in a file's weights; 1 for another program's file. Raises ValueError for damage."""
    if ALPHA not in metadata:
        return 1.0
    alpha, rank = float(metadata[ALPHA]), int(metadata.get(RANK, 0))
    if not (0 < alpha < math.inf and rank > 0):
        raise ValueError(f"{ALPHA} is {alpha}, {RANK} is {rank}")
    return alpha / rank
