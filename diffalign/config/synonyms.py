"""Names that other trainers have for our keys and values, and keys that were written into the wrong section."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

from pydantic import BaseModel

STEP = ("train.groups_per_step", "train.images_per_step", "train.records_per_step")
SYNONYMS: dict[str, tuple[str, ...]] = {
    "batch_size": (*STEP, "train.micro_batch"),
    "per_device_train_batch_size": ("train.micro_batch",),
    "train_batch_size": (*STEP, "train.micro_batch"),
    "gradient_accumulation": (*STEP, "train.micro_batch"),
    "gradient_accumulation_steps": (*STEP, "train.micro_batch"),
    "base_model": ("model.path",),
    "base_model_name_or_path": ("model.path",),
    "model_name": ("model.path",),
    "pretrained_model_name_or_path": ("model.path",),
    "dataset": ("data.path",),
    "dataset_name": ("data.path",),
    "train_data_dir": ("data.path",),
    "output_dir": ("run_dir", "out"),
    "learning_rate": ("optimizer.lr",),
    "unet_lr": ("optimizer.lr",),
    "lr_scheduler": ("optimizer.schedule",),
    "lr_scheduler_type": ("optimizer.schedule",),
    "lr_warmup_steps": ("optimizer.warmup_steps",),
    "warmup": ("optimizer.warmup_steps",),
    "optimizer_type": ("optimizer.name",),
    "lora_rank": ("tune.rank",),
    "network_dim": ("tune.rank",),
    "r": ("tune.rank",),
    "lora_alpha": ("tune.alpha",),
    "network_alpha": ("tune.alpha",),
    "target_modules": ("tune.targets",),
    "epochs": ("train.steps",),
    "num_train_epochs": ("train.steps",),
    "max_steps": ("train.steps",),
    "max_train_steps": ("train.steps",),
    "num_steps": ("train.steps",),
    "ema": ("train.ema_decay",),
    "gradient_clipping": ("train.max_grad_norm",),
    "beta_dpo": ("objective.beta",),
    "dpo_beta": ("objective.beta",),
    "loss": ("objective.name",),
    "loss_type": ("objective.name",),
    "checkpointing_steps": ("checkpoint.every",),
    "save_steps": ("checkpoint.every",),
    "save_total_limit": ("checkpoint.keep",),
    "logging_steps": ("train.log_every",),
    "eval_steps": ("validation.every",),
    "validation_steps": ("validation.every",),
    "validation_prompt": ("validation.prompts",),
    "report_to": ("tracking.trackers",),
    "logger": ("tracking.trackers",),
    "num_inference_steps": ("steps", "sampler.steps", "validation.steps"),
    "guidance": ("guidance_scale", "sampler.guidance_scale", "model.options.guidance"),
    "method": ("objective.name", "group.size"),
    "algorithm": ("objective.name", "method.name", "group.size"),
    "reward": ("validation.rewards", "rewards", "data.rewards", "sources"),
    "reward_model": ("reward.name", "validation.rewards", "rewards", "data.rewards"),
    "prompt_file": ("prompts", "data.prompts", "validation.prompts"),
    "cfg_scale": ("guidance_scale", "sampler.guidance_scale", "validation.guidance_scale"),
    "size": ("data.resolution", "resolution", "height"),
}
VALUES = {"gpu": "cuda"}
"""Other words for our values that are spelled like another value."""
METHODS: dict[str, tuple[str, str]] = {
    "gndm": ("distill", "GNDM"),
    "gdnm": ("distill", "GNDM"),
    "dmd": ("distill", "DMD2"),
    "dmd2": ("distill", "DMD2"),
    "refl": ("reward-gradient", "ReFL"),
    "draft": ("reward-gradient", "DRaFT"),
    "alignprop": ("reward-gradient", "AlignProp"),
}
"""Methods that are no objective of `train`: name, or what it is mistaken for -> the verb, and how it is written."""
IN_SHORT: dict[str, dict[str, str]] = {
    "rounds": {"prompts": "data.prompts"},
    "synth": {"reward": "rewards"},
    "reward-gradient": {"reward": "rewards"},
    "rank": {"reward": "sources"},
}
"""Arguments that mean the same for every verb: kind of config -> key of an argument -> the key there."""


def in_full(kind: str, argument: str) -> str:
    """Return an argument with the key that it has in this kind of config; a single value of a list becomes a list."""
    key, equals, value = argument.partition("=")
    there = IN_SHORT.get(kind, {}).get(key.strip())
    if there is None or not equals:
        return argument
    listed = there != "data.prompts" and not value.lstrip().startswith("[")
    return f"{there}=[{value}]" if listed else f"{there}={value}"


def other_verb(name: str) -> str:
    """Return "; NAME is a method of `diffalign VERB`..." for a method that is no objective; else ""."""
    if name.lower() not in METHODS:
        return ""
    verb, written = METHODS[name.lower()]
    return f"; {written} is a method of `diffalign {verb}`; `diffalign recipes` lists its recipes"


def elsewhere(kind: type[BaseModel], key: Sequence[str | int]) -> str:
    """Return "; did you mean ...?" for a key that another trainer has, or that belongs to another section; else ""."""
    there = dict.fromkeys(keys_of(kind))
    name, given = str(key[-1]), ".".join(map(str, key))
    found = [way for way in SYNONYMS.get(name, ()) if way in there]
    if not found:
        same = [way for way in there if way.rpartition(".")[2] == name and way != given]
        depth = min((way.count(".") for way in same), default=0)
        found = [way for way in same if way.count(".") == depth][:3]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def keys_of(kind: type[BaseModel], above: str = "") -> Iterator[str]:
    """Yield every key of a config, dotted; entries of lists are left out."""
    for name, field in kind.model_fields.items():
        yield f"{above}{name}"
        for section in (field.annotation, *get_args(field.annotation)):
            if isinstance(section, type) and issubclass(section, BaseModel):
                yield from keys_of(section, f"{above}{name}.")
