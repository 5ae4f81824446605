"""Typed configs: a YAML file or a shipped recipe, dotted overrides, and errors that name key, file and line.

    config = load_config("sdxl_dpo", ["data.path=my/pairs", "train.steps=200"])

The sections and their keys are in `config_schema.py`. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from diffalign.config.distill import DistillConfig
from diffalign.config.document import Document, apply_override, dump, read_document
from diffalign.config.explain import explain
from diffalign.config.judge import JudgeConfig
from diffalign.config.reward_gradient import RewardGradientConfig
from diffalign.config.rounds import RoundsConfig
from diffalign.config.schema import (
    EvalConfig,
    SampleConfig,
    TrainConfig,
)
from diffalign.config.synth import RankConfig, SynthConfig
from diffalign.errors import DiffalignError

Config = TypeVar("Config", bound=BaseModel)


def recipes() -> dict[str, Path]:
    """The shipped recipes: name -> file."""
    folder = Path(str(resources.files("diffalign.configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def config_path(name: str | Path) -> Path:
    """The file that CONFIG means: a file of that name, else a shipped recipe. DiffalignError where there is neither."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = recipes()
    if str(name) in shipped:
        return shipped[str(name)]
    if path.is_dir():
        raise DiffalignError(f"{name}: a folder, where a config file or the name of a recipe is expected")
    near = difflib.get_close_matches(path.stem, shipped, n=1)
    hint = f"did you mean {near[0]}?" if near else f"recipes: {', '.join(shipped)}"
    raise DiffalignError(f"{name}: neither a file nor a shipped recipe; {hint}")


def load_config(config: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config of a training run.

    `config`: a YAML file or the name of a shipped recipe. `overrides`: "section.key=value", the value as in YAML; later
    ones win. Raises DiffalignError, one line: the key, its file and line (or the argument), what is wrong, and what was
    perhaps meant.
    """
    return _validate(_document(config, overrides), TrainConfig)


def load_distill_config(config: str | Path, overrides: Sequence[str] = ()) -> DistillConfig:
    """As `load_config`, for `diffalign distill`."""
    return _validate(_document(config, overrides), DistillConfig)


def load_reward_gradient_config(config: str | Path, overrides: Sequence[str] = ()) -> RewardGradientConfig:
    """As `load_config`, for `diffalign reward-gradient`."""
    return _validate(_document(config, overrides), RewardGradientConfig)


def load_run_config(path: Path) -> TrainConfig | DistillConfig | RewardGradientConfig:
    """The config.yaml of a run directory, whichever verb wrote it: its keys say which."""
    document = read_document(path)
    if "student" in document.values:
        return _validate(document, DistillConfig)
    if "rewards" in document.values:
        return _validate(document, RewardGradientConfig)
    return _validate(document, TrainConfig)


def load_judge_config(config: str | Path, overrides: Sequence[str] = ()) -> JudgeConfig:
    """As `load_config`, for `diffalign judge`."""
    return _validate(_document(config, overrides), JudgeConfig)


def load_sample_config(config: str | Path, overrides: Sequence[str] = ()) -> SampleConfig:
    """As `load_config`, for `diffalign sample`."""
    return _validate(_document(config, overrides), SampleConfig)


def load_eval_config(config: str | Path, overrides: Sequence[str] = ()) -> EvalConfig:
    """As `load_config`, for `diffalign eval`."""
    return _validate(_document(config, overrides), EvalConfig)


def load_synth_config(config: str | Path, overrides: Sequence[str] = ()) -> SynthConfig:
    """As `load_config`, for `diffalign synth`."""
    return _validate(_document(config, overrides), SynthConfig)


def load_rounds_config(config: str | Path, overrides: Sequence[str] = ()) -> RoundsConfig:
    """As `load_config`, for `diffalign rounds`."""
    return _validate(_document(config, overrides), RoundsConfig)


def load_rank_config(source: str | Path, overrides: Sequence[str] = ()) -> RankConfig:
    """As `load_config`, for `diffalign rank`; `source` may also be the dataset's folder, with everything in overrides."""
    if not Path(source).is_dir():
        if Path(source).suffix not in (".yaml", ".yml") and str(source) not in recipes():
            raise DiffalignError(f"{source}: no such dataset folder; give one, or a YAML file with data and the rest")
        return _validate(_document(source, overrides), RankConfig)
    document = Document({"data": str(source)}, str(source))
    for argument in overrides:
        apply_override(document, argument)
    return _validate(document, RankConfig)


def eval_config_of_run(run_dir: Path, overrides: Sequence[str] = ()) -> EvalConfig:
    """The evaluation of a training run: its model, weights and folder; `prompts` must come as an override."""
    trained = run_dir / "config.yaml"
    if not trained.is_file():
        raise DiffalignError(
            f"{run_dir}: no run directory, it holds no config.yaml; give the run_dir of a training run or a config file"
        )
    document = read_document(trained)
    if "student" in document.values:
        raise DiffalignError(
            f"{run_dir}: a distilled student, which samples in its own way; draw with `diffalign sample` and "
            f"model.path={run_dir / 'student'}, its number of steps and guidance_scale=0, and then `diffalign score`"
        )
    run = Document(
        {
            "model": document.values.get("model"),
            "device": document.values.get("device", "auto"),
            "weights": str(run_dir / "weights"),
            "out": str(run_dir),
        },
        str(trained),
        {key: place for key, place in document.places.items() if key[:1] in (("model",), ("device",))},
    )
    for argument in overrides:
        apply_override(run, argument)
    return _validate(run, EvalConfig)


def resolved_yaml(config: BaseModel) -> str:
    """The config with every default written out; `load_config` reads it back as it was, less the access token."""
    values = config.model_dump(mode="json")
    for section in (values, *values.get("generators", [])):
        if section.get("model", {}).get("token") is not None:
            section["model"]["token"] = None
    return dump(values)


def _document(config: str | Path, overrides: Sequence[str]) -> Document:
    document = read_document(config_path(config))
    for argument in overrides:
        apply_override(document, argument)
    return document


def _validate(document: Document, kind: type[Config]) -> Config:
    try:
        return kind.model_validate(document.values)
    except ValidationError as error:
        raise DiffalignError(explain(error, document, kind)) from None
