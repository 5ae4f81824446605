"""Make a judge trainable, by adapters or in all weights, and merge adapters back into the weights."""

import torch
from torch import nn

from diffalign.config import JudgeTuneSection
from diffalign.errors import DiffalignError
from diffalign.rewards.judge import Judge
from diffalign.training.protocols import Parameters


def make_trainable(judge: Judge, tune: JudgeTuneSection, seed: int) -> Parameters:
    """Free the parameters that train, and return them by name, float32.

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
    """Set dropout to 0: train mode then computes what eval mode does, and transformers checkpoints in train mode only."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)


def merged(judge: Judge) -> Judge:
    """Merge a judge's adapters, if it has any, into its weights, and return it. The adapters are gone afterwards."""
    if hasattr(judge.model, "merge_and_unload"):
        judge.model = judge.model.merge_and_unload()
    return judge
