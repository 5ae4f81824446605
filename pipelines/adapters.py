"""LoRA adapters on a diffusers trunk: add, switch without losing gradients, save and load in diffusers' format."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffalign.errors import DiffalignError, brief
from diffalign.pipelines.save_lora import as_trained, write_lora

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

POLICY, REFERENCE, FAKE = "policy", "reference", "fake"
LORA_FILE = "pytorch_lora_weights.safetensors"


def check_targets(trunk: nn.Module, targets: Sequence[str]) -> None:
    """Raise DiffalignError if a target names no linear or convolution layer of the trunk.

    peft itself only refuses a list in which nothing matches; a partly wrong list would train fewer layers than asked.
    A target matches a module of this name or whose dotted name ends with it.
    """
    # A layer that has an adapter already lies one level deeper.
    linear = (n for n, m in trunk.named_modules() if isinstance(m, nn.Linear | nn.Conv2d))
    layers = {n.removesuffix(".base_layer") for n in linear if ".lora_" not in n}
    missing = [t for t in targets if not any(n == t or n.endswith("." + t) for n in layers)]
    if not targets or missing:
        ends = sorted({".".join(n.split(".")[-2:]) for n in layers})
        known = [e for e in ends if not e.split(".")[0].isdigit()][:12]
        wrong = ", ".join(missing) or "an empty list"
        raise DiffalignError(
            f"tune.targets: no layer of this model matches {wrong}; names that exist: {', '.join(known)}"
        )


def add_adapter(
    trunk: nn.Module, rank: int, alpha: float, targets: Sequence[str], seed: int, adapter: str = POLICY
) -> None:
    """Freeze the trunk and add an adapter in float32: B = 0, A Gaussian from `seed`, on any device."""
    from peft import LoraConfig

    if rank < 1:
        raise DiffalignError(f"tune.rank: {rank} is not possible; it must be at least 1")
    check_targets(trunk, targets)
    trunk.requires_grad_(False)
    # peft annotates alpha as an integer but only divides it by the rank.
    scale: Any = alpha
    config = LoraConfig(r=rank, lora_alpha=scale, init_lora_weights="gaussian", target_modules=list(targets))
    model: Any = trunk  # diffusers' PeftAdapterMixin adds methods that nn.Module does not declare
    with warnings.catch_warnings():
        # peft warns of a second adapter; student and fake are meant.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        model.add_adapter(config, adapter_name=adapter)
    # peft draws from the global generator on whatever device it likes; redraw on the CPU, in the order of the names.
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter_parameters(trunk, adapter).items():
        parameter.data = parameter.data.float()
        if ".lora_A." in name:
            draw = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, 1.0 / rank, generator=generator)
            parameter.data.copy_(draw)


def adapter_parameters(trunk: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters by name, sorted."""
    own = {n: p for n, p in trunk.named_parameters() if ".lora_" in n and f".{adapter}." in n}
    return dict(sorted(own.items()))


def has_adapter(trunk: nn.Module, adapter: str) -> bool:
    """Return whether the trunk has an adapter of this name."""
    return adapter in vars(trunk).get("peft_config", {})


@contextmanager
def use_adapter(trunk: nn.Module, adapter: str | None) -> Iterator[None]:
    """Run with this adapter, or with the bare base (None), and restore the state after.

    diffusers' own `disable_adapters` and `set_adapter` also clear `requires_grad`, so that a backward of a graph built
    before silently loses its gradients. Here only the two fields that the forward reads are changed.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in trunk.modules() if isinstance(m, BaseTunerLayer)]
    before = [(m._disable_adapters, m._active_adapter) for m in layers]
    try:
        for layer in layers:
            layer._disable_adapters = adapter is None
            layer._active_adapter = [adapter] if adapter is not None else layer._active_adapter
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


def save_adapter(trunk: nn.Module, trunk_name: str, adapter: str, folder: Path) -> None:
    """Write an adapter into `folder` as a LoRA for diffusers' `load_lora_weights`."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import get_peft_model_state_dict

    config: Any = vars(trunk)["peft_config"][adapter]
    layers = {name: m for name, m in trunk.named_modules() if isinstance(m, LoraLayer) and adapter in m.scaling}
    scales = {name: layer.scaling[adapter] for name, layer in layers.items()}
    state = get_peft_model_state_dict(trunk, adapter_name=adapter)
    write_lora(folder / LORA_FILE, state, config.to_dict(), scales, trunk_name)


def lora_file(folder: str | Path) -> Path:
    """Find the LoRA file in a weights folder, or the file itself. Raises DiffalignError if there is none."""
    path = Path(folder)
    path = path / LORA_FILE if path.is_dir() else path
    if not path.is_file():
        raise DiffalignError(f"no LoRA weights at {path}; give a folder that holds {LORA_FILE}")
    if path.suffix != ".safetensors":
        raise DiffalignError(f"{path} is not a .safetensors file; other formats can carry code and are not read")
    return path


def load_adapter(
    pipeline: DiffusionPipeline, trunk: nn.Module, trunk_name: str, folder: str | Path, adapter: str
) -> None:
    """Load a LoRA in any format diffusers reads as `adapter`, in float32.

    Raises DiffalignError if it belongs to another model, touches text encoders, or does not fit in full.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft.utils import set_peft_model_state_dict
    from safetensors import SafetensorError

    path = lora_file(folder)
    try:
        state, options = _read(pipeline, trunk, trunk_name, path)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise DiffalignError(f"{path} cannot be read as a LoRA: {brief(error)}") from error
    prefix = f"{trunk_name}."
    other = sorted({key.split(".")[0] for key in state if not key.startswith(prefix)})
    if other:
        raise DiffalignError(
            f"{path}: adapts {', '.join(other)}, but only a LoRA of this model's {trunk_name} can be used"
        )
    if not any(".lora_A." in key for key in state):
        state = convert_unet_state_dict_to_peft(state)
    model: Any = trunk
    if has_adapter(trunk, adapter):
        model.delete_adapters(adapter)
    try:
        with warnings.catch_warnings():
            # peft warns of a second adapter; policy and reference are meant.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            model.load_lora_adapter(state, prefix=trunk_name, adapter_name=adapter, _pipeline=pipeline, **options)
    except (RuntimeError, ValueError, KeyError) as error:
        raise DiffalignError(f"{path}: this LoRA does not fit the model ({brief(error)})") from error
    loaded = len(adapter_parameters(trunk, adapter))
    saved = sum(1 for key in state if ".alpha" not in key)
    if loaded != saved:
        raise DiffalignError(
            f"{path}: this LoRA does not fit the model ({loaded} tensors of {saved} have a place in it)"
        )
    for parameter in adapter_parameters(trunk, adapter).values():
        parameter.data = parameter.data.float()
    # diffusers made the layers in the base's dtype, so a bf16 base has rounded the weights: set them once more.
    plain = {key.removeprefix(prefix): value for key, value in state.items()}
    set_peft_model_state_dict(trunk, plain, adapter_name=adapter)


def _read(
    pipeline: DiffusionPipeline, trunk: nn.Module, trunk_name: str, path: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the state dict, with component prefixes, and the options (alphas or metadata) that loading needs."""
    from safetensors import safe_open

    where = {"weight_name": path.name, "return_lora_metadata": True, "use_safetensors": True, "local_files_only": True}
    if trunk_name == "transformer":
        state, metadata = pipeline.lora_state_dict(str(path.parent), **where)
        alphas = None
    else:
        # UNet pipelines also read older formats, whose alphas come beside the weights instead of in the metadata.
        config: Any = trunk.config
        state, alphas, metadata = pipeline.lora_state_dict(str(path.parent), unet_config=config, **where)
    if not metadata:
        return state, {"metadata": metadata} if trunk_name == "transformer" else {"network_alphas": alphas}
    with safe_open(path, framework="pt") as file:
        state, alpha = as_trained(state, file.metadata() or {})
    return state, {"metadata": metadata if alpha is None else {**metadata, f"{trunk_name}.lora_alpha": alpha}}


def check_rank(
    trunk: nn.Module, folder: str | Path, rank: int, alpha: float, targets: Sequence[str] | None = None
) -> None:
    """Raise DiffalignError unless the loaded policy adapter is what the config says: same rank, alpha and targets."""
    config: Any = vars(trunk)["peft_config"][POLICY]
    if (config.r, float(config.lora_alpha)) != (rank, float(alpha)) or config.rank_pattern or config.alpha_pattern:
        if config.rank_pattern or config.alpha_pattern:
            raise DiffalignError(f"{folder}: its layers differ in rank or alpha; only a uniform LoRA can be trained on")
        raise DiffalignError(
            f"tune.init: {folder} has rank {config.r} and alpha {config.lora_alpha:g}, the config says {rank} and "
            f"{alpha:g}; set tune.rank: {config.r} and tune.alpha: {config.lora_alpha:g}"
        )
    if targets is not None and set(targets) != set(config.target_modules):
        raise DiffalignError(
            f"tune.targets: {folder} already decides the layers; leave tune.targets out with tune.init"
        )
