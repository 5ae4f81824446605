"""LoRA adapters on a diffusers trunk: add, switch without losing gradients, save and load in diffusers' format."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.pipelines.kohya import from_kohya
from diffalign.pipelines.lean_lora import make_lean
from diffalign.pipelines.lora_file import (
    LORA_FILE,
    LoraFile,
    LoraLayer,
    TextEncoders,
    fold,
    product_size,
    read_lora_file,
)
from diffalign.pipelines.original_names import sd3_place
from diffalign.pipelines.save_lora import write_lora
from diffalign.pretrained import foreign

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

POLICY, REFERENCE, FAKE = "policy", "reference", "fake"


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
    make_lean(trunk)
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


def adapter_layers(trunk: nn.Module) -> list[nn.Module]:
    """Return all layers that have adapters.

    They are found once: a walk over all modules of SDXL takes 18 ms. The list is kept on the trunk as long as its adapters are
    the same ones.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    own = vars(trunk)
    configs = list(own.get("peft_config", {}).items())
    before, layers = own.get("_adapter_layers", (None, []))
    if before is None or [(n, id(c)) for n, c in before] != [(n, id(c)) for n, c in configs]:
        layers = [m for m in trunk.modules() if isinstance(m, BaseTunerLayer)]
        own["_adapter_layers"] = (configs, layers)
    found: list[nn.Module] = layers
    return found


@contextmanager
def use_adapter(trunk: nn.Module, adapter: str | None) -> Iterator[None]:
    """Run with this adapter, or with the bare base (None), and restore the state after.

    diffusers' own `disable_adapters` and `set_adapter` also clear `requires_grad`, so that a backward of a graph built
    before silently loses its gradients. Here only the two fields that the forward reads are changed, past nn.Module's slow
    way to set an attribute.
    """
    layers = [vars(layer) for layer in adapter_layers(trunk)]
    before = [(layer["_disable_adapters"], layer["_active_adapter"]) for layer in layers]
    active = [adapter]
    try:
        for layer in layers:
            layer["_disable_adapters"] = adapter is None
            if adapter is not None:
                layer["_active_adapter"] = active
        yield
    finally:
        for layer, (disabled, active_before) in zip(layers, before, strict=True):
            layer["_disable_adapters"], layer["_active_adapter"] = disabled, active_before


def save_adapter(trunk: nn.Module, trunk_name: str, adapter: str, folder: Path) -> None:
    """Write an adapter into `folder` as a LoRA for diffusers' `load_lora_weights`."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import get_peft_model_state_dict

    config: Any = vars(trunk)["peft_config"][adapter]
    layers = {name: m for name, m in trunk.named_modules() if isinstance(m, LoraLayer) and adapter in m.scaling}
    scales = {name: layer.scaling[adapter] for name, layer in layers.items()}
    state = get_peft_model_state_dict(trunk, adapter_name=adapter)
    write_lora(folder / LORA_FILE, state, config.to_dict(), scales, trunk_name)


def load_adapter(
    pipeline: DiffusionPipeline,
    trunk: nn.Module,
    trunk_name: str,
    folder: str | Path,
    adapter: str,
    text_encoders: TextEncoders = "refuse",
) -> None:
    """Load a LoRA that anybody saved, or a checkpoint's, as `adapter`, in float32 and at the strength that it states.

    text_encoders: as `read_lora_file` takes it. Raises DiffalignError if the LoRA belongs to another model, and unless every
    tensor of the file has its place in this one.
    """
    from peft.utils import set_peft_model_state_dict

    file = read_lora_file(folder, trunk_name, text_encoders)
    state, strength = _translated(pipeline, trunk, trunk_name, file)
    ranks = _check_places(trunk, file, state)
    model: Any = trunk
    if has_adapter(trunk, adapter):
        model.delete_adapters(adapter)
    config = {f"{trunk_name}.{key}": value for key, value in _config(file, ranks, strength).items()}
    prefixed = {f"{trunk_name}.{key}": value for key, value in state.items()}
    with foreign(f"{file.path}: this LoRA does not fit the model"):
        model.load_lora_adapter(prefixed, prefix=trunk_name, adapter_name=adapter, _pipeline=pipeline, metadata=config)
    make_lean(trunk)
    loaded = adapter_parameters(trunk, adapter)
    if len(loaded) != len(state):
        raise DiffalignError(
            f"{file.path}: this LoRA does not fit the model ({len(loaded)} tensors of {len(state)} have a place in it)"
        )
    for parameter in loaded.values():
        parameter.data = parameter.data.float()
    # diffusers made the layers in the base's dtype, so a bf16 base has rounded the weights: set them once more.
    set_peft_model_state_dict(trunk, dict(state), adapter_name=adapter)
    _check_strength(trunk, file, adapter)


def _translated(
    pipeline: DiffusionPipeline, trunk: nn.Module, trunk_name: str, file: LoraFile
) -> tuple[dict[str, Tensor], float]:
    """Return the matrices under the names of the trunk's layers, `NAME.lora_A.weight`, and the strength of all of them.

    Where layers differ in strength it is folded into B, and 1 is left. diffusers translates names, and sees no alphas: it
    does not apply all of them.
    """
    strengths = {layer.strength for layer in file.layers.values()}
    layers = file.layers.values() if len(strengths) == 1 else [fold(layer) for layer in file.layers.values()]
    state = {key: value for layer in layers for key, value in zip(layer.keys, (layer.down, layer.up), strict=True)}
    config: Any = trunk.config
    if any(key.startswith("lora_unet_joint_blocks") for key in state):  # SD3's, which diffusers does not translate
        state = from_kohya(state, sd3_place, _outputs(trunk), config)
    elif file.former:
        options: dict[str, Any] = {"unet_config": config} if trunk_name == "unet" else {}
        with foreign(f"{file.path}: this LoRA does not fit the model"):
            found = pipeline.lora_state_dict(state, **options)
            state = _as_peft(found[0] if isinstance(found, tuple) else found)
    parts = {name for name, _ in trunk.named_children()}
    plain = {key.removeprefix(f"{trunk_name}."): value for key, value in state.items()}
    other = sorted({key.split(".")[0] for key in plain} - parts)
    if other:
        raise DiffalignError(
            f"{file.path}: adapts {', '.join(other)[:80]}, but only a LoRA of this model's {trunk_name} can be used"
        )
    return plain, strengths.pop() if len(strengths) == 1 else 1.0


def _outputs(trunk: nn.Module) -> dict[str, int]:
    """Return the number of outputs of every layer that can have an adapter."""
    layers = {name.removesuffix(".base_layer"): part for name, part in trunk.named_modules() if ".lora_" not in name}
    return {name: len(part.weight) for name, part in layers.items() if isinstance(part, nn.Linear | nn.Conv2d)}


def _as_peft(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.utils import convert_unet_state_dict_to_peft

    peft = any(".lora_A." in key for key in state)
    converted: dict[str, Tensor] = state if peft else convert_unet_state_dict_to_peft(state)
    return converted


def _check_places(trunk: nn.Module, file: LoraFile, state: dict[str, Tensor]) -> dict[str, int]:
    """Return the rank of each layer. Raise DiffalignError for a layer that the trunk lacks or has in another shape."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = dict(trunk.named_modules())
    ranks: dict[str, int] = {}
    for key, down in state.items():
        name = key.removesuffix(".lora_A.weight")
        if name == key:
            continue
        layer = modules.get(name)
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        if not isinstance(base, nn.Linear | nn.Conv2d):
            raise DiffalignError(f"{file.path}: this LoRA does not fit the model, which has no layer {name}")
        up = state[f"{name}.lora_B.weight"]
        sizes = (
            (base.in_features, base.out_features)
            if isinstance(base, nn.Linear)
            else (base.in_channels // base.groups, base.out_channels)
        )
        if (down.shape[1], up.shape[0]) != sizes:
            raise DiffalignError(
                f"{file.path}: this LoRA does not fit the model: its layer {name} goes from {down.shape[1]} to {up.shape[0]} "
                f"values, the model's from {sizes[0]} to {sizes[1]}"
            )
        ranks[name] = down.shape[0]
    return ranks


def _config(file: LoraFile, ranks: dict[str, int], strength: float) -> dict[str, Any]:
    """Return the peft config of a LoRA: its rank and alpha, and those of layers that differ."""
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    targets = file.targets or []
    named = all(any(name == t or name.endswith(f".{t}") for t in targets) for name in ranks)
    odd = {f"^{name}": own for name, own in ranks.items() if own != rank}
    return {
        "r": rank,
        "lora_alpha": round(strength * rank, 6),
        "rank_pattern": odd,
        "alpha_pattern": {name: round(strength * own, 6) for name, own in odd.items()},
        "target_modules": targets if named else sorted(ranks),
    }


def _check_strength(trunk: nn.Module, file: LoraFile, adapter: str) -> None:
    """Compare the size of what the adapter adds to the weights with that of the file: nothing may be lost on the way."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    wanted = sum(product_size(layer) for layer in file.layers.values())
    found = sum(
        product_size(
            LoraLayer(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter], ("", ""))
        )
        for layer in trunk.modules()
        if isinstance(layer, BaseTunerLayer) and adapter in layer.lora_A
    )
    if abs(found - wanted) > 1e-3 * wanted:
        raise DiffalignError(
            f"{file.path}: this LoRA is read as {(found / wanted) ** 0.5:.3f} times what it holds, so it is not used; merge it "
            "into the model with the program it is made for"
        )


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
