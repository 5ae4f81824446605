"""`diffalign init`: write a short config for preference training, from five answers. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.config import load_config
from diffalign.config.document import dump
from diffalign.errors import DiffalignError
from diffalign.files import check_place, write_whole
from diffalign.progress import say

FEW_PAIRS = 2000
"""Pairs below which the recipe for few pairs is the base."""
PASSES = 10
"""Passes over few pairs; validation stops earlier where the result gets worse."""
FEWEST_STEPS, MOST_STEPS = 40, 2000
SMALL_GPU = 10.0
"""GB below which the frozen weights are kept in 8 bits."""
LORA_ON_SD15: dict[str, Any] = {
    "tune": {"kind": "lora"},
    "optimizer": {"lr": 1e-5},
    "train": {"groups_per_step": 16, "steps": 1000},
}
"""What the full recipe of SD 1.5 itself names for a GPU with less memory, with smaller steps for data of one's own."""


@dataclass(frozen=True)
class Base:
    """A base model that `init` offers. many, few: the recipes for many pairs and for few. toy: of the embedded world."""

    many: str
    few: str
    toy: bool = False


BASES: dict[str, Base] = {
    "sdxl": Base("sdxl_dpo", "sdxl_dpo_small"),
    "sd35-medium": Base("sd35_medium_dpo", "sd35_medium_dpo_small"),
    "sd3-medium": Base("sd3_medium_dpo", "sd3_medium_dpo"),
    "sd15": Base("sd15_dpo", "sd15_dpo"),
    "shapes-sd3": Base("shapes_sd3_dpo", "shapes_sd3_dpo", toy=True),
    "shapes-sdxl": Base("shapes_sdxl_dpo", "shapes_sdxl_dpo", toy=True),
}


@dataclass(frozen=True)
class Answers:
    """What `init` asks. memory: of the GPU in GB; prompts: held-out prompts for validation, None for no validation."""

    data: Path
    model: str
    memory: float
    prompts: str | None
    run_dir: Path


def count_groups(data: Path) -> int | None:
    """Return the number of groups in a dataset folder; None where there is no dataset yet."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        return int(read_metadata(data / "groups.parquet").num_rows)
    except (OSError, ArrowException):
        return None


def check_new(path: Path) -> None:
    """Raise DiffalignError where the config exists already, or cannot be written: before the questions, not after."""
    if path.exists():
        raise DiffalignError(f"{path}: exists already; name another file, or delete it")
    check_place(path)


def write_config(path: Path, answers: Answers) -> None:
    """Write the config and say what comes next: `diffalign init`.

    Raises DiffalignError for a file that exists, an unknown model, and a config that `diffalign train` would refuse.
    """
    check_new(path)
    if answers.model not in BASES:
        raise DiffalignError(f"--model {answers.model}: unknown here; one of {', '.join(BASES)}")
    groups = count_groups(answers.data)
    recipe, values = _values(answers, groups)
    write_whole(path, _text(path, recipe, values, groups))
    try:
        load_config(path)
    except DiffalignError:
        path.unlink()
        raise
    say(f"wrote {path}: {recipe}, with what you said")
    if groups is None:
        say(f"next: make the dataset, as `diffalign pairs winners/ losers/ --out {answers.data}`")
    say(f"{'then' if groups is None else 'next'}: diffalign train {path} --dry-run")


def _values(answers: Answers, groups: int | None) -> tuple[str, dict[str, Any]]:
    """Return the recipe that the config extends, and what it states itself."""
    base = BASES[answers.model]
    few = groups is None or groups < FEW_PAIRS
    values: dict[str, Any] = {
        "run_dir": str(answers.run_dir),
        "data": {"path": str(answers.data)},
        **(LORA_ON_SD15 if answers.model == "sd15" else {}),
    }
    train = dict(values.pop("train", {}))
    if not base.toy:
        train["micro_batch"] = "auto"
        if answers.memory < SMALL_GPU:
            values["model"] = {"quantize": "int8"}
    if few and groups is not None:
        recipe = load_config(base.few)
        steps = PASSES * groups // (train.get("groups_per_step") or recipe.train.groups_per_step)
        train["steps"] = min(max(FEWEST_STEPS, steps), recipe.train.steps if base.toy else MOST_STEPS)
        if recipe.optimizer.warmup_steps:
            values["optimizer"] = {**values.get("optimizer", {}), "warmup_steps": train["steps"] // 10}
    if train:
        values["train"] = train
    values["validation"] = _validation(answers, base, train.get("steps"))
    return base.few if few else base.many, {key: value for key, value in values.items() if value}


def _validation(answers: Answers, base: Base, steps: int | None) -> dict[str, Any]:
    if answers.prompts is None:
        # The recipes for few pairs validate; without prompts there is nothing to draw.
        return {} if base.few == base.many else {"every": None, "prompts": None, "patience": None}
    return {"every": 50 if steps is None else max(10, steps // 8), "prompts": answers.prompts}


def _text(path: Path, recipe: str, values: dict[str, Any], groups: int | None) -> str:
    known = "not there yet" if groups is None else f"{groups} groups"
    lines = [
        f"# Written by `diffalign init`. Everything else is as in the recipe: `diffalign config show {path}`.",
        "kind: train",
        f"extends: {recipe}",
    ]
    notes = {
        "data": known,
        "model": "the frozen weights in 8 bits, for a small GPU",
        "validation": "held-out prompts choose the best weights" if "every" in values.get("validation", {}) else "",
    }
    if values.get("validation", {}).get("every", 0) is None:
        notes["validation"] = "none: name a file with held-out prompts here to have the best weights chosen"
    for key, value in values.items():
        lines += ["", *([f"# {notes[key]}"] if notes.get(key) else []), dump({key: value}).rstrip("\n")]
    return "\n".join(lines) + "\n"
