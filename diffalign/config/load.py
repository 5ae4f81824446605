"""Loading a config: a YAML file or a shipped recipe, dotted overrides, and errors that name key, file and line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError

from diffalign.config.distill import DistillConfig
from diffalign.config.document import Document, Key, apply_override, dump, is_text, read_document
from diffalign.config.explain import explain
from diffalign.config.images import BenchConfig, EvalConfig, SampleConfig
from diffalign.config.judge import JudgeConfig
from diffalign.config.personal import PersonalConfig
from diffalign.config.recipes import config_path, read_recipe, recipes
from diffalign.config.reward_gradient import RewardGradientConfig
from diffalign.config.rounds import RoundsConfig
from diffalign.config.run import StepSection, divisors
from diffalign.config.section import Section
from diffalign.config.synonyms import in_full
from diffalign.config.synth import RankConfig, SynthConfig
from diffalign.config.texts import text_key
from diffalign.config.train import TrainConfig
from diffalign.errors import DiffalignError
from diffalign.progress import say_aside

KIND = "kind"
KINDS: dict[str, type[BaseModel]] = {
    "train": TrainConfig,
    "distill": DistillConfig,
    "reward-gradient": RewardGradientConfig,
    "judge": JudgeConfig,
    "judge personal": PersonalConfig,
    "sample": SampleConfig,
    "eval": EvalConfig,
    "synth": SynthConfig,
    "rank": RankConfig,
    "rounds": RoundsConfig,
    "bench": BenchConfig,
}
"""What `kind:` may say, which is the verb that reads the file -> the config's class."""

RunConfigs = TrainConfig | DistillConfig | RewardGradientConfig | JudgeConfig
Config = TypeVar("Config", bound=BaseModel)


def load(kind: str, source: str | Path, overrides: Sequence[str] = ()) -> BaseModel:
    """Load the config of a verb.

    `kind`: a key of KINDS. `source`: a YAML file or the name of a shipped recipe. `overrides`: "section.key=value", the value
    as in YAML; later ones win. Returns an instance of `KINDS[kind]`. Raises DiffalignError, one line: the key, its file and
    line (or the argument), what is wrong, and what was perhaps meant.
    """
    document = read_recipe(config_path(source), KINDS[kind])
    _check_kind(document, kind)
    return _loaded(document, KINDS[kind], overrides)


def load_for(kind: str, source: str, overrides: Sequence[str] = ()) -> BaseModel:
    """Load the config of a verb from what its users name: as `load`, but also from the folder that a verb works on."""
    if kind == "rank":  # a dataset
        return load_rank_config(source, overrides)
    if kind == "judge personal":  # a dataset
        return load_personal_config(source, overrides)
    if kind == "eval" and Path(source).is_dir():  # a training run, of which eval takes model and weights
        return eval_config_of_run(Path(source), overrides)
    return load(kind, source, overrides)


def load_config(config: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Load the config of `diffalign train`; see `load`."""
    return cast("TrainConfig", load("train", config, overrides))


def load_distill_config(config: str | Path, overrides: Sequence[str] = ()) -> DistillConfig:
    """Load the config of `diffalign distill`; see `load`."""
    return cast("DistillConfig", load("distill", config, overrides))


def load_reward_gradient_config(config: str | Path, overrides: Sequence[str] = ()) -> RewardGradientConfig:
    """Load the config of `diffalign reward-gradient`; see `load`."""
    return cast("RewardGradientConfig", load("reward-gradient", config, overrides))


def load_judge_config(config: str | Path, overrides: Sequence[str] = ()) -> JudgeConfig:
    """Load the config of `diffalign judge`; see `load`."""
    return cast("JudgeConfig", load("judge", config, overrides))


def load_sample_config(config: str | Path, overrides: Sequence[str] = ()) -> SampleConfig:
    """Load the config of `diffalign sample`; see `load`."""
    return cast("SampleConfig", load("sample", config, overrides))


def load_eval_config(config: str | Path, overrides: Sequence[str] = ()) -> EvalConfig:
    """Load the config of `diffalign eval`; see `load`."""
    return cast("EvalConfig", load("eval", config, overrides))


def load_synth_config(config: str | Path, overrides: Sequence[str] = ()) -> SynthConfig:
    """Load the config of `diffalign synth`; see `load`."""
    return cast("SynthConfig", load("synth", config, overrides))


def load_rounds_config(config: str | Path, overrides: Sequence[str] = ()) -> RoundsConfig:
    """Load the config of `diffalign rounds`; see `load`."""
    return cast("RoundsConfig", load("rounds", config, overrides))


def load_rank_config(source: str | Path, overrides: Sequence[str] = ()) -> RankConfig:
    """Load the config of `diffalign rank`; `source` may also be the dataset's folder, with everything in `overrides`."""
    return cast("RankConfig", _load_of_dataset("rank", source, overrides))


def load_personal_config(source: str | Path, overrides: Sequence[str] = ()) -> PersonalConfig:
    """Load the config of `diffalign judge personal`; `source` may also be the dataset's folder."""
    return cast("PersonalConfig", _load_of_dataset("judge personal", source, overrides))


def _load_of_dataset(kind: str, source: str | Path, overrides: Sequence[str]) -> BaseModel:
    """Load a config whose `data` is a dataset: from a file or a recipe, or from the dataset's folder and arguments."""
    if not Path(source).is_dir():
        if Path(source).suffix not in (".yaml", ".yml") and str(source) not in recipes():
            raise DiffalignError(f"{source}: no such dataset folder; give one, or a YAML file with data and the rest")
        return load(kind, source, overrides)
    document = Document({"data": str(source)}, str(source))
    return _loaded(document, KINDS[kind], overrides)


def load_run_config(path: Path) -> RunConfigs:
    """Load the config.yaml of a run directory, whichever verb wrote it. Raises DiffalignError for one that is no run's."""
    document = read_document(path)
    kind = kind_of_run(document.values)
    if not issubclass(KINDS[kind], RunConfigs):
        raise DiffalignError(f"{document.place((KIND,))}: a config of `diffalign {kind}`, which trains nothing")
    return cast("RunConfigs", _validate(document, KINDS[kind]))


def kind_of_run(values: dict[str, Any]) -> str:
    """Return the kind of a run's config; runs from before `kind:` existed are told apart by their keys."""
    if values.get(KIND) in KINDS:
        return str(values[KIND])
    for key, kind in (("student", "distill"), ("rewards", "reward-gradient"), ("role", "judge")):
        if key in values:
            return kind
    return "train"


def eval_config_of_run(run_dir: Path, overrides: Sequence[str] = ()) -> EvalConfig:
    """Make the evaluation of a training run: its model, weights and folder; `prompts` must come as an override."""
    return _loaded(_model_of_run(run_dir, run_dir), EvalConfig, overrides)


def bench_config(model: str, overrides: Sequence[str] = ()) -> BenchConfig:
    """Make the config of `diffalign bench`.

    model: a run directory, whose weights are judged, or what `model.path` may be. Results go to `bench/` of a run, and
    else to runs/bench-NAME. Raises DiffalignError as `load`.
    """
    if (Path(model) / "config.yaml").is_file():
        return _loaded(_model_of_run(Path(model), Path(model) / "bench"), BenchConfig, overrides)
    name = Path(model).stem if model.endswith(".safetensors") else Path(model).name
    values = {"model": {"path": model}, "out": f"runs/bench-{name or 'model'}"}
    return _loaded(Document(values, model), BenchConfig, overrides)


def _model_of_run(run_dir: Path, out: Path) -> Document:
    """Return a config with the model, device and weights of a training run. Raises DiffalignError for a run without them."""
    trained = run_dir / "config.yaml"
    if not trained.is_file():
        raise DiffalignError(
            f"{run_dir} is not a run directory: it has no config.yaml; give a training run's run_dir, or a config file"
        )
    document = read_document(trained)
    kind = kind_of_run(document.values)
    if kind == "distill":
        raise DiffalignError(
            f"{run_dir}: a distilled student, which samples in its own way; draw with `diffalign sample` and "
            f"model.path={run_dir / 'student'}, its number of steps and guidance_scale=0, and then `diffalign score`"
        )
    if kind not in ("train", "reward-gradient"):
        raise DiffalignError(f"{run_dir}: a run of `diffalign {kind}`, which has no image model to evaluate")
    return Document(
        {
            "model": document.values.get("model"),
            "device": document.values.get("device", "auto"),
            "weights": str(run_dir / "weights"),
            "out": str(out),
        },
        str(trained),
        {key: place for key, place in document.places.items() if key[:1] in (("model",), ("device",))},
    )


def resolved_yaml(config: BaseModel) -> str:
    """Return the config with every default written out; `load` reads it back as it was, less the access token."""
    values = config.model_dump(mode="json")
    if isinstance(config, Section):
        values = {key: values[key] for key in type(config).reading_order()}
    return dump(values)


def _check_kind(document: Document, kind: str) -> None:
    """Refuse the config of another verb by its `kind:`, instead of by its first unknown key."""
    given = document.values.get(KIND, kind)
    if given != kind and given in KINDS:
        raise DiffalignError(
            f"{document.place((KIND,))}: kind is {given}: this file is for `diffalign {given}`, not for `diffalign {kind}`"
        )


def _loaded(document: Document, model: type[Config], overrides: Sequence[str]) -> Config:
    """Apply the arguments, let go of what they leave without a meaning in the file, validate, and print what was let go."""
    before = {section: dict(value) for section, value in document.values.items() if isinstance(value, dict)}
    places = dict(document.places)
    field = model.model_fields.get(KIND)
    for argument in (in_full(str(field.default) if field else "", given) for given in overrides):
        way = argument.partition("=")[0].strip().split(".")
        apply_override(document, argument, text_key(model, way) if is_text(argument) else None)
    notes = [_drop_keys_of_another(document, name, before.get(name, {}), places) for name in ("objective", "method")]
    notes.append(_fit_micro_batch(document, model, before.get("train", {})))
    config = _validate(document, model)
    for note in filter(None, notes):
        say_aside(f"note: {note}")
    return config


def _drop_keys_of_another(
    document: Document, section: str, before: dict[str, Any], places: dict[Key, str]
) -> str | None:
    """Drop the file's keys of an objective that an argument has replaced: no number of one suits another."""
    now = document.values.get(section)
    if not isinstance(now, dict) or "name" not in before or now.get("name") == before["name"]:
        return None
    stale = [
        key for key in before if key != "name" and document.places.get((section, key)) == places.get((section, key))
    ]
    for key in stale:
        now.pop(key, None)
    if not stale:
        return None
    return (
        f"{section}.name={now.get('name')} replaces {before['name']} of {document.source}: its "
        f"{', '.join(stale)} {'are' if len(stale) > 1 else 'is'} dropped, and the defaults of {now.get('name')} apply"
    )


def _fit_micro_batch(document: Document, model: type[BaseModel], before: dict[str, Any]) -> str | None:
    """Lower the file's micro-batch to a divisor of what a step draws, where an argument has changed that alone."""
    field = model.model_fields.get("train")
    section, now = field.annotation if field else None, document.values.get("train")
    if not (isinstance(section, type) and issubclass(section, StepSection) and isinstance(now, dict)):
        return None
    drawn, micro = now.get(section.drawn), now.get("micro_batch")
    if type(drawn) is not int or type(micro) is not int or drawn < 1 or micro < 1 or drawn % micro == 0:
        return None
    asked_for = document.place(("train", "micro_batch")).startswith("argument")
    if asked_for or before.get(section.drawn) == drawn:
        return None
    now["micro_batch"] = divisors(drawn, micro)[0]
    return f"train.micro_batch={micro} of {document.source} does not divide {drawn}: {now['micro_batch']} is used"


def _validate(document: Document, kind: type[Config]) -> Config:
    try:
        return kind.model_validate(document.values)
    except ValidationError as error:
        raise DiffalignError(explain(error, document, kind)) from None
