"""Making a judge trainable: adapters, or all weights; and putting adapters back into the weights."""

from typing import Any

import torch
from torch import nn

from diffalign.errors import DiffalignError
from diffalign.rewards.judge import Judge


def make_trainable(judge: Judge, tune: Any, seed: int) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, float32. `tune`: the section of a config.

    Dropout is set to 0 everywhere: it would make a token's probability differ between sampling and learning.
    Raises DiffalignError where no module has a name in tune.targets.
    """
    without_dropout(judge.model)
    judge.model.requires_grad_(False)
    if tune.kind == "full":
        judge.model.requires_grad_(True)
        return dict(sorted(judge.model.named_parameters()))
    from peft import LoraConfig, get_peft_model

    names = [name for name, module in judge.model.named_modules() if isinstance(module, nn.Linear)]
    for target in tune.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            raise DiffalignError(f"tune.targets: the model has no linear layer {target}; it has {known}")
    config = LoraConfig(
        r=tune.rank, lora_alpha=tune.alpha, target_modules=list(tune.targets), init_lora_weights="gaussian"
    )
    with torch.random.fork_rng(devices=[]):
        judge.model = get_peft_model(judge.model, config).eval()
    own = {name: p for name, p in sorted(judge.model.named_parameters()) if p.requires_grad}
    # peft draws from the global generator on whatever device it likes; redraw on the CPU, in the order of the names.
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in own.items():
        parameter.data = parameter.data.float()
        if ".lora_A." in name:
            drawn = torch.empty(parameter.shape).normal_(0.0, 1.0 / tune.rank, generator=generator)
            parameter.data.copy_(drawn)
    return own


def without_dropout(model: nn.Module) -> None:
    """Train mode then computes what eval mode does, and transformers checkpoints gradients in train mode only."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)


def merged(judge: Judge) -> Judge:
    """The judge with its adapters in its weights; the same judge where it has none. The adapters are gone afterwards."""
    if hasattr(judge.model, "merge_and_unload"):
        judge.model = judge.model.merge_and_unload()
    return judge
