"""Read a LoRA that anybody saved: every key of the file is used, or the file is refused.

A LoRA is a pair of matrices for each layer, "down" A [r, ...] and "up" B [out, r, ...], that add strength x B A to the
layer's weights. The strength is alpha / r. Where alpha stands depends on who saved the file: in the metadata (diffusers), in
a config beside it (PEFT), in a tensor for each layer (kohya), or in the config of a checkpoint of ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from diffalign.errors import DiffalignError, brief
from diffalign.files.checksums import check_crc, file_crc
from diffalign.files.parse import parse_json
from diffalign.files.tensors import SUFFIX, read_metadata, read_tensors
from diffalign.pipelines.save_lora import as_trained

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
STATE, POLICY_FILE, AVERAGE_FILE = "state.json", "policy.safetensors", "ema.safetensors"
METADATA = "lora_adapter_metadata"

TextEncoders = Literal["refuse", "ignore"]

# Ends of keys, longest first where one contains another: which matrix they are.
ENDS = {
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".alpha": "alpha",
}
# What other kinds of adapters have in their keys, as expressions, and what to call them.
OTHER_KINDS = {
    "dora_scale": "DoRA (dora_scale)",
    "lora_magnitude_vector": "DoRA (lora_magnitude_vector)",
    "hada_": "LoHa (hada_)",
    "lokr_": "LoKr (lokr_)",
    "lora_mid": "LoCon with a core between its matrices (lora_mid)",
    "oft_": "OFT (oft_)",
    "boft_": "BOFT (boft_)",
    r"\.diff(_b)?$": "full difference of weights (.diff)",
    "lora_embedding": "LoRA of embeddings",
    "on_input": "IA3 (on_input)",
}
TEXT_ENCODER = re.compile(r"(lora_te\d?_|lora_te\d?\.|text_encoders?(_\d)?\.|te\d?\.|text_model\.)")


@dataclass(frozen=True)
class LoraLayer:
    """A pair of matrices, under the name that the file has for the layer, and the factor of their product."""

    down: Tensor
    up: Tensor
    strength: float
    keys: tuple[str, str]
    """The keys of down and up in the file."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as it was saved. `targets`: the layers' names if the file states them, as peft takes them."""

    path: Path
    layers: dict[str, LoraLayer]
    former: bool
    """Whether the keys are kohya's or diffusers' former ones, which diffusers translates."""
    targets: list[str] | None = None


def lora_file(folder: str | Path) -> Path:
    """Find the LoRA file in a weights folder, or the file itself. Raises DiffalignError if there is none."""
    path = Path(folder)
    if path.is_dir():
        named = [path / name for name in (LORA_FILE, PEFT_FILE) if (path / name).is_file()]
        others = sorted(path.glob(f"*{SUFFIX}"))
        path = (named or (others if len(others) == 1 else [path / LORA_FILE]))[0]
    if not path.is_file():
        raise DiffalignError(
            f"no LoRA weights at {path}; give a folder that holds {LORA_FILE} or {PEFT_FILE}, or a file"
        )
    if path.suffix != SUFFIX:
        raise DiffalignError(f"{path} is not a {SUFFIX} file; other formats can carry code and are not read")
    return path


def stated_base(folder: str | Path) -> str | None:
    """Return the base model that a LoRA's metadata names, as kohya's and other trainers write it; None without one."""
    path = Path(folder)
    if path.is_dir() and not any(path.glob(f"*{SUFFIX}")):
        return None  # the weights of a whole trunk
    metadata = read_metadata(lora_file(path))
    names = (metadata.get(key) for key in ("ss_sd_model_name", "modelspec.architecture", "ss_base_model_version"))
    return next((" ".join(name.split())[:120] for name in names if name), None)


def is_checkpoint(folder: str | Path) -> bool:
    """Return whether a folder is a checkpoint of a run, `checkpoints/step-N`."""
    return (Path(folder) / STATE).is_file()


def checkpoint_file(folder: Path) -> Path:
    """Return the file of a checkpoint with the weights to use: the average if one was kept, else the policy."""
    average = folder / AVERAGE_FILE
    return average if average.is_file() else folder / POLICY_FILE


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under the names of parameters. Raise DiffalignError where its checksum differs."""
    path = checkpoint_file(folder)
    tensors = read_tensors(path)
    try:
        stored = parse_json((folder / STATE).read_bytes()).get("files", {})
        check_crc(path.name, file_crc(path), stored)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DiffalignError(f"{folder} is damaged ({brief(error)}); use another checkpoint") from error
    return tensors


def checkpoint_tuning(folder: Path) -> dict[str, Any]:
    """Return the `tune` section of the config that a checkpoint was trained under.

    Raises DiffalignError for a folder that is no checkpoint of an image model.
    """
    try:
        tune = parse_json((folder / STATE).read_bytes())["config"]["tune"]
        return {
            "kind": tune["kind"],
            "rank": int(tune["rank"]),
            "alpha": float(tune["alpha"]),
            "targets": tune["targets"],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DiffalignError(
            f"{folder} is no checkpoint of an image model ({brief(error)}); give another folder"
        ) from error


def read_lora_file(folder: str | Path, trunk_name: str, text_encoders: TextEncoders = "refuse") -> LoraFile:
    """Read the LoRA in a folder, a file, or a checkpoint of a run.

    trunk_name: `unet` or `transformer`. text_encoders: "ignore" leaves out what adapts text encoders. Raises
    DiffalignError for a file that is damaged, for kinds of adapters other than plain LoRA, and for keys that have no pair.
    """
    folder = Path(folder)
    if is_checkpoint(folder):
        tune = checkpoint_tuning(folder)
        path = checkpoint_file(folder)
        state = {f"{trunk_name}.{key}": value for key, value in read_checkpoint(folder).items()}
        config = {"r": tune["rank"], "lora_alpha": tune["alpha"], "target_modules": tune["targets"]}
    else:
        path = lora_file(folder)
        state = read_tensors(path)
        config = _peft_config(path) if path.name == PEFT_FILE else _metadata_config(path, trunk_name)
        try:
            state, alpha = as_trained(state, read_metadata(path))
        except ValueError as error:
            raise DiffalignError(f"{path}: its metadata is damaged ({brief(error)}); use another file") from error
        config = config if alpha is None else {**config, "lora_alpha": alpha}
    # peft's own state dicts have the adapter's name in the key.
    named = {key: re.sub(r"(\.lora_[AB])\.\w+\.weight$", r"\1.weight", key) for key in state}
    if len(set(named.values())) < len(named):
        raise DiffalignError(f"{path}: holds several adapters; save one of them alone")
    state = {named[key].removeprefix("base_model.model."): value for key, value in state.items()}
    theirs = sorted(key for key in state if TEXT_ENCODER.match(key))
    if theirs and text_encoders == "refuse":
        raise DiffalignError(
            f"{path}: adapts text encoders too ({len(theirs)} of {len(state)} tensors, such as {theirs[0]}), which stay as "
            f"they are here; set model.lora_text_encoders=ignore to take the {trunk_name}'s part alone"
        )
    parts = _split(path, {key: value for key, value in state.items() if key not in set(theirs)})
    layers = {name: _layer(path, name, part, config) for name, part in parts.items()}
    if not layers:
        raise DiffalignError(f"{path}: holds no LoRA of a {trunk_name}; it has {len(state)} tensors")
    former = not any(key.endswith(".lora_A.weight") for key in state)
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        targets = None
    return LoraFile(path, layers, former, targets)


def _split(path: Path, state: Mapping[str, Tensor]) -> dict[str, dict[str, tuple[str, Tensor]]]:
    """Sort the tensors by layer and part, with their keys. Refuse other kinds, unknown keys, and infinite numbers."""
    parts: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, value in state.items():
        end = next((end for end in ENDS if key.endswith(end)), None)
        if end is None:
            kind = next((name for mark, name in OTHER_KINDS.items() if re.search(mark, key)), None)
            what = f"belongs to a {kind}, not to a plain LoRA" if kind else "is no part of a LoRA"
            raise DiffalignError(
                f"{path}: {key[:120]} {what}; only plain LoRAs are read, so merge it into the model with the program it is "
                "made for, or use another"
            )
        if not value.isfinite().all():
            raise DiffalignError(f"{path}: {key} holds numbers that are not finite; use another file")
        parts.setdefault(key.removesuffix(end), {})[ENDS[end]] = (key, value)
    return parts


def _layer(path: Path, name: str, part: Mapping[str, tuple[str, Tensor]], config: Mapping[str, Any]) -> LoraLayer:
    """Check and return the pair of a layer with its strength."""
    missing = [kind for kind in ("down", "up") if kind not in part]
    if missing:
        raise DiffalignError(
            f"{path}: layer {name} lacks its {missing[0]} matrix, so the file is not whole; use another"
        )
    (down_key, down), (up_key, up) = part["down"], part["up"]
    if down.ndim < 2 or up.ndim != down.ndim or up.shape[1] != down.shape[0] or 0 in (*down.shape, *up.shape):
        raise DiffalignError(
            f"{path}: the matrices of layer {name} do not fit each other ({list(down.shape)} and {list(up.shape)})"
        )
    rank = down.shape[0]
    strength = _config_strength(path, name, rank, config)
    if "alpha" in part:
        alpha = part["alpha"][1]
        if alpha.numel() != 1:
            raise DiffalignError(f"{path}: the alpha of layer {name} is {list(alpha.shape)}, not one number")
        own = float(alpha) / rank
        if strength is not None and abs(own - strength) > 1e-3 * abs(strength):
            raise DiffalignError(
                f"{path}: layer {name} has strength {own:g} by its alpha and {strength:g} by the metadata; use another file"
            )
        strength = own
    return LoraLayer(down, up, 1.0 if strength is None else strength, (down_key, up_key))


def _config_strength(path: Path, name: str, rank: int, config: Mapping[str, Any]) -> float | None:
    """Return the strength that a peft config gives a layer; None without a config."""
    if "lora_alpha" not in config:
        return None
    try:
        alpha = float(_of_layer(name, config.get("alpha_pattern") or {}, config["lora_alpha"]))
        stated = int(_of_layer(name, config.get("rank_pattern") or {}, config.get("r", rank)))
        root = bool(config.get("use_rslora"))
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise DiffalignError(f"{path}: its rank and alpha cannot be read ({brief(error)}); use another file") from error
    if stated != rank:
        raise DiffalignError(f"{path}: layer {name} has rank {rank}, its config says {stated}; use another file")
    return alpha / (rank**0.5 if root else rank)


def _of_layer(name: str, pattern: Mapping[str, Any], default: Any) -> Any:
    """Return a layer's entry in peft's `rank_pattern` or `alpha_pattern`, whose keys are ends of names or expressions."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name) or name.endswith(f".{key.lstrip('^')}") or name == key.lstrip("^"):
            return value
    return default


def _metadata_config(path: Path, trunk_name: str) -> dict[str, Any]:
    """Return the trunk's config in the metadata of a file that diffusers or diffalign saved; {} if it has none."""
    text = read_metadata(path).get(METADATA)
    if text is None:
        return {}
    try:
        content = parse_json(text)
        own = {
            key.removeprefix(f"{trunk_name}."): value for key, value in content.items() if key.startswith(trunk_name)
        }
    except (ValueError, AttributeError) as error:
        raise DiffalignError(f"{path}: its {METADATA} cannot be read ({brief(error)}); use another file") from error
    return _checked(path, own)


def _peft_config(path: Path) -> dict[str, Any]:
    """Return the config beside a file that PEFT saved."""
    file = path.parent / PEFT_CONFIG
    if not file.is_file():
        raise DiffalignError(f"{path}: {PEFT_CONFIG} is missing beside it, which holds its alpha; copy it, too")
    try:
        content = parse_json(file.read_bytes())
        if str(content["peft_type"]) != "LORA":
            raise DiffalignError(f"{file}: is a {content['peft_type']}, not a plain LoRA; only plain LoRAs are read")
        if "lora_alpha" not in content:
            raise DiffalignError(f"{file}: has no lora_alpha; use another file")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DiffalignError(f"{file} cannot be read ({brief(error)}); copy it once more") from error
    return _checked(file, content)


def _checked(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Refuse settings of peft that change what the matrices mean."""
    for key in ("use_dora", "lora_bias", "modules_to_save", "use_qalora", "trainable_token_indices"):
        if config.get(key):
            raise DiffalignError(f"{path}: {key} is set, so it is not a plain LoRA; only plain LoRAs are read")
    if config.get("bias", "none") not in ("none", None):
        raise DiffalignError(
            f"{path}: bias is {config['bias']!r}, so it is not a plain LoRA; only plain LoRAs are read"
        )
    return config


def product_size(layer: LoraLayer) -> float:
    """Return the squared norm of strength x B A, without forming it. A [r, ...], B [out, r, ...]."""
    down, up = (t.detach().double().flatten(1) for t in (layer.down, layer.up))
    return float(layer.strength**2 * ((up.T @ up) * (down @ down.T)).sum())


def fold(layer: LoraLayer) -> LoraLayer:
    """Return the layer with its strength in B, in float32."""
    return replace(layer, up=layer.up.float() * layer.strength, strength=1.0)
