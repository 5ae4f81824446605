"""Configs: what is read, what is written back, and where recipes come from."""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml
from pydantic import ValidationError

from diffalign.cli import app
from diffalign.config import (
    KINDS,
    OBJECTIVE_SECTIONS,
    EvalConfig,
    SampleConfig,
    TrainConfig,
    config_path,
    eval_config_of_run,
    list_recipes,
    load,
    load_config,
    load_eval_config,
    load_run_config,
    load_sample_config,
    recipes,
    resolved_yaml,
)
from diffalign.config.commented import commented_recipe, read_notes, reference
from diffalign.config.document import read_document
from diffalign.config.objective import objective_section
from diffalign.config.recipes import base_of
from diffalign.errors import DiffalignError
from diffalign.objectives import OBJECTIVES, GroupErrors, Objective, ObjectiveOutput

SMALL = "run_dir: runs/x\nmodel: {path: m}\ndata: {path: d}\n"


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, SMALL))
    assert (config.tune.kind, config.tune.rank, config.objective.name) == ("lora", 16, "dpo")
    assert config.objective.arguments()["beta"] == 2000.0
    assert config.train.micro_batch == 8 and config.optimizer.betas == (0.9, 0.999)
    assert config.run_dir == Path("runs/x") and (config.data.cache, config.data.cache_dir) == ("all", None)


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("0.5", 0.5), (".5", 0.5), ("3", 3.0), ("+2.5e+1", 25.0), ("010", 10.0)],
)
def test_numbers_are_yaml_1_2(tmp_path: Path, written: str, value: float) -> None:
    config = load_config(write(tmp_path, SMALL + f"optimizer: {{lr: {written}}}\n"))
    assert config.optimizer.lr == value and isinstance(config.optimizer.lr, float)


def test_words_of_yaml_1_1_stay_words(tmp_path: Path) -> None:
    text = SMALL.replace("{path: m}", "{path: on, revision: 2024-01-01}") + "train: {mixed_precision: no}\n"
    config = load_config(write(tmp_path, text))
    assert (config.model.path, config.model.revision, config.train.mixed_precision) == ("on", "2024-01-01", "no")


def test_overrides_win_in_their_order(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "train: {steps: 5}\ntune:\n")
    config = load_config(
        path,
        ["train.steps=7", "train.steps=9", "tune.targets=[to_q, to_k]", "objective={name: sft}", "tune.rank=4"],
    )
    assert config.train.steps == 9 and config.tune.targets == ["to_q", "to_k"] and config.tune.rank == 4
    assert config.objective.name == "sft" and config.objective.arguments() == {}
    assert load_config(path, ["train.ema_decay="]).train.ema_decay is None


@pytest.mark.parametrize(("groups", "micro"), [(8, 8), (6, 6), (12, 6), (32, 8), (7, 7), (11, 1)])
def test_default_micro_batch_divides(tmp_path: Path, groups: int, micro: int) -> None:
    config = load_config(write(tmp_path, SMALL), [f"train.groups_per_step={groups}"])
    assert config.train.micro_batch == micro


def test_resolved_yaml_reads_back(tmp_path: Path) -> None:
    overrides = [
        "model.revision='12e4567'",
        "model.variant='010'",
        "optimizer.lr=3e-7",
        "tune.init=a b/#c",
        "data.limit=3",
    ]
    config = load_config(write(tmp_path, SMALL), overrides)
    again = load_config(write(tmp_path, resolved_yaml(config), "again.yaml"))
    assert again == config and again.model.revision == "12e4567" and again.model.variant == "010"


def test_token_is_never_written(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, SMALL), ["model.token=hf_secret"])
    assert config.model.token == "hf_secret"
    assert "hf_secret" not in resolved_yaml(config) and "hf_secret" not in repr(config)


def test_configs_are_frozen(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, SMALL))
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3


def test_sample_and_eval(tmp_path: Path) -> None:
    common = "model: {path: m}\nprompts: testbed:test\nout: o\n"
    sample = load_sample_config(write(tmp_path, common), ["images_per_prompt=2", "height=64", "width=64"])
    assert isinstance(sample, SampleConfig) and sample.weights is None and sample.images_per_prompt == 2
    judged = load_eval_config(write(tmp_path, common + "weights: w\n"), ["reward.options={threshold: 0.2}"])
    assert isinstance(judged, EvalConfig) and judged.seeds == 4
    assert (judged.reward.name, judged.reward.detector, judged.reward.options) == (
        "geneval",
        "shapes",
        {"threshold": 0.2},
    )


def test_eval_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = load_config(write(tmp_path, SMALL), ["model.options.max_sequence_length=24", "device=cpu"])
    write(run, resolved_yaml(config))
    judged = eval_config_of_run(run, ["prompts=testbed:test", "n=8"])
    assert judged.model == config.model and judged.device == "cpu"
    assert judged.weights == run / "weights" and judged.out == run and judged.n == 8
    with pytest.raises(DiffalignError, match="prompts is missing; give prompts="):
        eval_config_of_run(run)
    with pytest.raises(DiffalignError, match="holds no config.yaml"):
        eval_config_of_run(tmp_path / "nowhere")


def test_objectives_match_their_dataclasses() -> None:
    assert set(OBJECTIVE_SECTIONS) == set(OBJECTIVES)
    for name, section in OBJECTIVE_SECTIONS.items():
        fields = {field.name: field.default for field in dataclasses.fields(OBJECTIVES[name])}
        assert section().arguments() == fields, name
        assert section().name == name
        assert section().build() == OBJECTIVES[name]()


def test_a_section_has_the_bounds_and_the_meaning_of_its_dataclass() -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine(Objective):
        """A method with a field of every kind."""

        beta: float = dataclasses.field(metadata={"gt": 0, "lt": 9, "description": "strength", "unit": "1"})
        steps: int = dataclasses.field(default=3, metadata={"ge": 1})
        clamp: float | None = dataclasses.field(default=None, metadata={"gt": 0})
        how: Literal["a", "b"] = "a"
        sizes: list[int] = dataclasses.field(default_factory=lambda: [1, 2])
        title: ClassVar[str] = "Mine"

        def __post_init__(self) -> None:
            if self.steps > 5 and self.how == "b":
                raise ValueError("how=b takes at most 5 steps")

        def __call__(self, group: GroupErrors) -> ObjectiveOutput:
            return ObjectiveOutput(group.policy_error.sum(1))

    section = objective_section("mine", Mine)
    made = section(beta=1.0)
    assert made.model_dump() == {"name": "mine", "beta": 1.0, "steps": 3, "clamp": None, "how": "a", "sizes": [1, 2]}
    assert made.build() == Mine(1.0) and section.model_fields["beta"].description == "strength"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "beta\n  Field required"),
        ({"beta": 0.0}, "greater than 0"),
        ({"beta": 9.0}, "less than 9"),
        ({"beta": "1"}, "valid number"),
        ({"beta": float("inf")}, "finite number"),
        ({"beta": 1.0, "steps": 1.5}, "valid integer"),
        ({"beta": 1.0, "steps": 0}, "greater than or equal to 1"),
        ({"beta": 1.0, "clamp": -1.0}, "greater than 0"),
        ({"beta": 1.0, "how": "c"}, "'a' or 'b'"),
        ({"beta": 1.0, "bata": 1.0}, "Extra inputs"),
        ({"beta": 1.0, "name": "yours"}, "Input should be 'mine'"),
        ({"beta": 1.0, "how": "b", "steps": 6}, "how=b takes at most 5 steps"),
    ]
    for given, said in wrong:
        with pytest.raises(ValidationError, match=said):
            section.model_validate(given)


# --- kinds -----------------------------------------------------------------------------------------------------


def test_the_config_of_another_verb_is_refused_by_its_kind(tmp_path: Path) -> None:
    path = write(tmp_path, "kind: distill\n" + SMALL)
    with pytest.raises(DiffalignError, match=r"config\.yaml:1: kind is distill: .*`diffalign distill`, not .*train`"):
        load_config(path)
    with pytest.raises(DiffalignError, match=r"config\.yaml:1: kind should be 'train', not 'trane'"):
        load_config(write(tmp_path, "kind: trane\n" + SMALL))


@pytest.mark.parametrize("name", ["sdxl_dpo", "sdxl_dmd2_4step", "sdxl_refl", "shapes_judge_risd"])
def test_a_run_directory_says_what_it_is(tmp_path: Path, name: str) -> None:
    config = load(kind_of(name), name)
    path = write(tmp_path, resolved_yaml(config))
    assert load_run_config(path) == config
    # A run from before `kind:` existed.
    plain = yaml.safe_load(path.read_text())
    assert plain.pop("kind") == kind_of(name)
    assert load_run_config(write(tmp_path, yaml.safe_dump(plain))) == config


def test_keys_of_one_family_are_read_where_they_stood_before(tmp_path: Path) -> None:
    model = "model: {path: m, use_t5: false, max_sequence_length: 12, guidance: 3.5}"
    config = load_config(write(tmp_path, SMALL.replace("model: {path: m}", model)), ["model.guidance=2.0"])
    assert config.model.options == {"use_t5": False, "max_sequence_length": 12, "guidance": 2.0}
    assert load_config(write(tmp_path, SMALL.replace("model: {path: m}", model))).model.options == {
        "use_t5": False,
        "max_sequence_length": 12,
    }


# --- recipes ---------------------------------------------------------------------------------------------------


def kind_of(name: str) -> str:
    return str(yaml.safe_load(config_path(name).read_text(encoding="utf-8"))["kind"])


Way = tuple[str | int, ...]


def stated(path: Path) -> list[Way]:
    """The way to every value that a file states, as PyYAML reads it."""
    found: list[Way] = []

    def walk(value: object, way: Way) -> None:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                walk(inner, (*way, name))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, inner in enumerate(value):
                walk(inner, (*way, index))
        else:
            found.append(way)

    walk(yaml.safe_load(path.read_text(encoding="utf-8")), ())
    return found


def without(values: dict[str, Any], way: Way) -> dict[str, Any]:
    """A copy of nested values that lacks one."""
    copy = deepcopy(values)
    inside: Any = copy
    for part in way[:-1]:
        inside = inside[part]
    del inside[way[-1]]
    return copy


def test_the_recipes_are_there() -> None:
    assert {"sdxl_dpo", "sdxl_dpo_full", "sd15_dpo", "sd35_medium_dpo", "sd3_medium_dpo", "sdxl_sft"} <= set(recipes())
    assert {"shapes_sd3_dpo", "shapes_sdxl_dpo", "shapes_sd3_reward_gradient"} <= set(recipes())
    assert {"synth_synpic", "synth_one_gpu", "synth_shapes", "sdxl_refl", "sd3_draft"} <= set(recipes())
    distilled = {"shapes_sd3_gndm", "sdxl_dmd2_4step", "sdxl_dmd2_1step", "sd3_medium_gndm", "sd35_medium_gndm"}
    assert distilled <= set(recipes())


@pytest.mark.parametrize("name", sorted(recipes()))
def test_a_recipe_states_what_differs_and_why(name: str) -> None:
    path = config_path(name)
    config = load(kind_of(name), name)
    _, notes = read_notes(path)
    own = read_document(path).values
    base = base_of(path)
    for way in stated(path):
        if way[0] in ("kind", "extends", "about") or way[-1] == "name" or way in notes:
            continue
        rest = {key: value for key, value in without(own, way).items() if key not in ("extends", "about")}
        below = {key: value for key, value in read_document(base).values.items() if key != "about"} if base else {}
        try:
            changed = KINDS[kind_of(name)].model_validate(merged(below, rest)) != config
        except ValidationError:
            continue  # it cannot be left out
        assert changed, f"{name}: {way} states, without a note, what is so without it"


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = below.keys() & above.keys()
    inner = {k: merged(below[k], above[k]) for k in both if isinstance(below[k], dict) and isinstance(above[k], dict)}
    return {**below, **above, **inner}


@pytest.mark.parametrize("name", sorted(recipes()))
def test_the_printed_recipe_has_every_key_and_loads_to_the_same(tmp_path: Path, name: str) -> None:
    config = load(kind_of(name), name)
    text = commented_recipe(name)
    assert load(kind_of(name), write(tmp_path, text)) == config
    printed = yaml.safe_load(text)
    for key, value in config.model_dump().items():
        assert key in printed, f"{name}: {key} is not printed"
        if isinstance(value, dict) and key != "options":
            assert set(printed[key]) == set(value), f"{name}: {key} is incomplete"
    _, notes = read_notes(config_path(name))
    for note in notes.values():
        assert note in text, f"{name}: the note {note!r} is lost"
    lines = text.splitlines()
    first = lines.index(f"kind: {kind_of(name)}")
    for above, line in pairwise(lines[first - 1 :]):
        # Entries of a list after the first are explained by the first.
        if line.strip() and not line.lstrip().startswith(("#", "-")) and not line.startswith("    "):
            assert "#" in line or above.lstrip().startswith("#"), f"{name}: no comment at {line!r}"


def test_the_list_of_recipes_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app(["recipes"], prog_name="diffalign")
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    for recipe in list_recipes():
        assert all((recipe.task, recipe.model, recipe.memory))
        line = next(line for line in lines if line.startswith(f"{recipe.name} "))
        assert line.split("  ")[-1].strip() == recipe.memory


@pytest.mark.parametrize("name", sorted(name for name in recipes() if kind_of(name) == "train"))
def test_groups_and_objective_change_with_one_argument_each(name: str) -> None:
    config = load_config(name, ["train.groups_per_step=2"])
    assert config.train.groups_per_step == 2 and 2 % config.train.micro_batch == 0
    changed = load_config(name, ["objective.name=ipo"])
    assert changed.objective.name == "ipo"
    if load_config(name).objective.name != "ipo":
        assert changed.objective == OBJECTIVE_SECTIONS["ipo"]()


def test_what_an_argument_leaves_without_meaning_is_dropped_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("sdxl_dpo", ["objective.name=ipo", "objective.beta=7"])
    assert config.objective.arguments() == {"beta": 7.0}
    assert load_config("flux_gdro", ["objective.name=ipo"]).objective.arguments() == {"beta": 2000.0}
    said = capsys.readouterr().err
    assert "objective.name=ipo replaces gdro of" in said and "its beta, tau, gamma are dropped" in said
    assert load_config("sdxl_dpo", ["train.groups_per_step=5"]).train.micro_batch == 1
    assert "note: train.micro_batch=2 of" in capsys.readouterr().err
    with pytest.raises(DiffalignError, match="3 does not divide train.groups_per_step=16"):
        load_config("sdxl_dpo", ["train.micro_batch=3"])  # what is asked for is not lowered


# --- extends ---------------------------------------------------------------------------------------------------


def test_extends_takes_the_rest_from_a_base(tmp_path: Path) -> None:
    write(tmp_path, SMALL + "optimizer: {lr: 1e-3, warmup_steps: 2}\nobjective: {name: gdro, tau: 0.1}\n", "base.yaml")
    child = write(tmp_path, "extends: base\noptimizer: {lr: 5e-4}\nobjective: {name: dpo}\n")
    config = load_config(child)
    assert (config.optimizer.lr, config.optimizer.warmup_steps, config.model.path) == (5e-4, 2, "m")
    assert config.objective == OBJECTIVE_SECTIONS["dpo"]()
    # Each value is blamed where it stands.
    wrong = write(tmp_path, SMALL + "train: {stepz: 3}\n", "base.yaml")
    with pytest.raises(DiffalignError, match=f"^{wrong}:4: unknown key train.stepz"):
        load_config(child)
    recipe = write(tmp_path, "extends: sdxl_dpo\nrun_dir: mine\ndata: {path: d}\n", "mine.yaml")
    assert load_config(recipe).objective.arguments()["beta"] == 5000.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nextends: nowhere\n", "config.yaml:2: extends nowhere, which is neither a file beside this one nor"),
        ("extends: sdxl_dpoo\n", "config.yaml:1: extends sdxl_dpoo, .*did you mean sdxl_dpo"),
        ("extends: config\n", "config.yaml:1: the file extends itself"),
        ("extends: shapes_sd3_dpo\n", "config.yaml:1: extends shapes_sd3_dpo, which extends bases/shapes_sd3 itself"),
        ("extends: [a]\n", "config.yaml:1: extends takes the name of a recipe"),
        ("about: {task: x}\n", "config.yaml:1: about takes three texts"),
    ],
)
def test_mistakes_in_extends(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(DiffalignError, match=expected):
        load_config(write(tmp_path, text))


# --- documentation ---------------------------------------------------------------------------------------------


def test_the_page_of_all_keys_is_what_the_schema_prints() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == reference(), "run `make docs`"
    for model in KINDS.values():
        for key, field in model.model_fields.items():
            assert f"{key}:" in reference() and (field.description or not isinstance(field.annotation, str)), key


def test_a_file_wins_over_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, SMALL, "sdxl_dpo")
    assert load_config("sdxl_dpo").model.path == "m"


def test_a_mistyped_recipe() -> None:
    with pytest.raises(DiffalignError, match="^sdxl_dpoo: neither a file nor a shipped recipe; did you mean sdxl_dpo"):
        load_config("sdxl_dpoo")
    with pytest.raises(DiffalignError, match="recipes: .*shapes_sd3_dpo"):
        load_config("zzz/qqq.yaml")


def test_python_callers_get_the_same_checks() -> None:
    with pytest.raises(ValidationError, match="does not divide"):
        TrainConfig.model_validate(
            {"run_dir": "r", "model": {"path": "m"}, "data": {"path": "d"}, "train": {"micro_batch": 3}}
        )
