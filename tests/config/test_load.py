"""Configs: what is read, what is written back, and where recipes come from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml
from pydantic import ValidationError

from diffalign.config import (
    OBJECTIVE_SECTIONS,
    EvalConfig,
    SampleConfig,
    TrainConfig,
    eval_config_of_run,
    load,
    load_config,
    load_eval_config,
    load_run_config,
    load_sample_config,
    resolved_yaml,
)
from diffalign.config.objective import objective_section
from diffalign.errors import DiffalignError
from diffalign.objectives import OBJECTIVES, GroupErrors, Objective, ObjectiveOutput
from helpers.configs import SMALL, kind_of, write


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
    assert config.train.steps == 9
    assert config.tune.targets == ["to_q", "to_k"]
    assert config.tune.rank == 4
    assert config.objective.name == "sft"
    assert config.objective.arguments() == {}
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
    assert again == config
    assert again.model.revision == "12e4567"
    assert again.model.variant == "010"


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
    assert isinstance(sample, SampleConfig)
    assert sample.weights is None
    assert sample.images_per_prompt == 2
    judged = load_eval_config(write(tmp_path, common + "weights: w\n"), ["reward.options={threshold: 0.2}"])
    assert isinstance(judged, EvalConfig)
    assert judged.seeds == 4
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
    assert judged.model == config.model
    assert judged.device == "cpu"
    assert judged.weights == run / "weights"
    assert judged.out == run
    assert judged.n == 8
    with pytest.raises(DiffalignError, match="prompts is missing; give prompts="):
        eval_config_of_run(run)
    with pytest.raises(DiffalignError, match="it has no config.yaml"):
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


def test_python_callers_get_the_same_checks() -> None:
    with pytest.raises(ValidationError, match="does not divide"):
        TrainConfig.model_validate(
            {"run_dir": "r", "model": {"path": "m"}, "data": {"path": "d"}, "train": {"micro_batch": 3}}
        )


# --- texts in the place of sections ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "argument", "same_as"),
    [
        ("eval", "reward=pickscore", "reward.name=pickscore"),
        ("eval", "more_rewards=[hpsv2, pickscore]", "more_rewards=[{name: hpsv2}, {name: pickscore}]"),
        ("eval", "model=shapes-sd3", "model.path=shapes-sd3"),
        ("train", "objective=ipo", "objective.name=ipo"),
        ("train", "optimizer=adafactor", "optimizer.name=adafactor"),
        ("train", "data=elsewhere", "data.path=elsewhere"),
        ("train", "validation.rewards=[sharpness]", "validation.rewards=[{name: sharpness}]"),
        ("synth", "prompts=mine.txt", "prompts.source=mine.txt"),
        ("synth", "generators.0.scheduler=ddim", "generators.0.scheduler.name=ddim"),
        ("synth", "rewards.0=aesthetic", "rewards.0.name=aesthetic"),
        ("reward-gradient", "method=draft", "method.name=draft"),
        ("reward-gradient", "rewards=[pickscore]", "rewards=[{name: pickscore}]"),
        ("reward-gradient", "sampler.scheduler=euler", "sampler.scheduler.name=euler"),
        ("distill", "reward.terms=[sharpness]", "reward.terms=[{name: sharpness}]"),
        # The same argument for all verbs, wherever the key stands.
        ("rounds", "prompts=mine.txt", "data.prompts=mine.txt"),
        ("synth", "reward=aesthetic", "rewards=[{name: aesthetic}]"),
        ("synth", "reward=[aesthetic, sharpness]", "rewards=[{name: aesthetic}, {name: sharpness}]"),
        ("reward-gradient", "reward=hpsv2", "rewards=[{name: hpsv2}]"),
    ],
)
def test_a_text_is_short_for_the_main_key_of_a_section(tmp_path: Path, kind: str, argument: str, same_as: str) -> None:
    sources = {
        "train": "sdxl_dpo",
        "synth": "synth_one_gpu",
        "reward-gradient": "sdxl_refl",
        "distill": "shapes_sd3_gndm",
        "rounds": "rounds_shapes_gdro",
    }
    source: str | Path = sources.get(kind, "")
    if kind == "eval":
        source = write(tmp_path, "model: {path: m, dtype: bfloat16}\nweights: w\nout: o\nprompts: p.txt\n")
    more = ["prompts.n=7"] if kind == "synth" else []
    short = load(kind, source, [argument, *more])
    assert short == load(kind, source, [same_as, *more]) and short != load(kind, source, more)


def test_texts_in_a_file_and_texts_that_are_none(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "run_dir: r\nmodel: m\ndata: d\nobjective: ipo\nvalidation: {rewards: [pickscore, {name: sharpness}]}\n",
    )
    config = load_config(path)
    assert (config.model.path, config.objective.name) == ("m", "ipo")
    assert [reward.name for reward in config.validation.rewards] == ["pickscore", "sharpness"]
    assert load_config(path, ["objective.beta=7", "model.variant=fp16"]).objective.arguments()["beta"] == 7.0
    assert load_config(path, ["validation.rewards.0.detector=null"]).validation.rewards[0].name == "pickscore"
    child = write(
        tmp_path, "extends: config\ndata: other\nobjective: {beta: 9}\nmodel: {variant: fp16}\n", "child.yaml"
    )
    below = load_config(child)
    assert (below.data.path, below.model.path, below.objective.name) == (Path("other"), "m", "ipo")
    for argument, said in {
        "train=long": "train should be a section with keys",
        "reward=x": "unknown key reward",
        "objective=ipoo": "did you mean ipo",
        "validation.rewards=pickscore": r"write \[pickscore\]",
        "data=3": "data should be a section with keys",
    }.items():
        with pytest.raises(DiffalignError, match=said):
            load_config(path, [argument])
