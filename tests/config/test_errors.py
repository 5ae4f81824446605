"""Every mistake in a config: one line that names the key, its place and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffalign.config import (
    load,
    load_config,
    load_distill_config,
    load_rounds_config,
    load_sample_config,
    load_synth_config,
)
from diffalign.errors import DiffalignError

BASE = """\
run_dir: runs/x
model:
  path: m
data:
  path: d
train:
  steps: 20
"""


def complaint(folder: Path, text: str, *overrides: str) -> str:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DiffalignError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), "c.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BASE + "  stepz: 3\n", "c.yaml:8: unknown key train.stepz; did you mean steps?"),
        (BASE + "trian: {}\n", "c.yaml:8: unknown key trian; did you mean train?"),
        (BASE + "zzz: 1\n", "c.yaml:8: unknown key zzz; keys here: kind, run_dir, seed, device, model, tune, data"),
        (BASE + "objective: {name: dpo, bata: 3}\n", "c.yaml:8: unknown key objective.bata; did you mean beta?"),
        (BASE + "objective: {name: dop}\n", "c.yaml:8: unknown objective dop; did you mean dpo?"),
        (BASE + "objective: {name: xyz}\n", "c.yaml:8: unknown objective xyz; known: dpo, sft, rankdpo, smpo, gdro"),
        (BASE + "objective: {beta: 3}\n", "c.yaml:8: objective.name is missing; one of dpo, sft, rankdpo"),
        (BASE + "objective: [dpo]\n", "c.yaml:8: objective should be a section with keys, not ['dpo']"),
        (
            BASE + "objective: {name: smpo, reward_min: 0.3, reward_max: 0.2}\n",
            "c.yaml:8: objective: reward_max should be above reward_min=0.3, not 0.2",
        ),
        (
            BASE + "objective: {name: rankdpo, pair_weight: dlta}\n",
            "c.yaml:8: objective.pair_weight should be 'delta', 'gain'",
        ),
        (BASE + "objective: {name: dpo, beta: -1}\n", "c.yaml:8: objective.beta should be greater than 0, not -1"),
        (
            BASE + "reference: {keep: predictions}\n",
            "c.yaml:8: reference.keep: keep says what goes into a store, and there is none; set reference.store",
        ),
        (
            BASE + "reference: {store: k}\nobjective: {name: disco}\n",
            "disco looks at the reference's predictions, not at its errors alone; set reference.keep=predictions",
        ),
        (
            BASE + "reference: {store: k}\nobjective: {name: simpo}\n",
            "c.yaml:8: reference.store: simpo has no reference, and nothing would be kept; leave reference.store out",
        ),
        (
            BASE + "reference: {store: k}\nnoise: inverted\n",
            "c.yaml:8: reference.store: the noise is found by the policy, which is another one at every step",
        ),
        (BASE + "  images_per_pass: 0\n", "c.yaml:8: train.images_per_pass should be greater than 0, not 0"),
        (BASE + "device: gpu\n", "not 'gpu'; did you mean cuda?"),
        (
            BASE + "noise: sharde\n",
            "c.yaml:8: noise should be 'shared', 'independent', 'inverted' or 'tracked', not 'sharde'; did you mean",
        ),
        (
            BASE + "objective: {name: smpo}\nlabels: {source: scores.pickscore}\n",
            "c.yaml:9: labels.source: smpo compares scores between 0 and 1",
        ),
        (BASE + "inversion: {steps: 5}\n", "c.yaml:8: inversion.steps: inversion has no effect with noise=shared"),
        (BASE + "noise: inverted\ninversion: {average_from: 2}\n", "c.yaml:9: inversion.average_from: a step has 2"),
        (
            BASE.replace("path: d", "path: d\n  group_size: 1"),
            "c.yaml:6: data.group_size should be greater than or equal",
        ),
        (BASE + "seed: '1'\n", "c.yaml:8: seed should be a valid integer, not '1'; without quotes"),
        (BASE + "seed: true\n", "c.yaml:8: seed should be a valid integer, not True"),
        (BASE + "seed: 1.5\n", "c.yaml:8: seed should be a valid integer, not 1.5"),
        (BASE + "optimizer: {lr: .nan}\n", "c.yaml:8: optimizer.lr should be a finite number, not nan"),
        (BASE + "optimizer:\n  betas:\n  - 0.9\n", "c.yaml:9: optimizer.betas has too few entries"),
        (BASE + "optimizer: {betas: [0.9, 1.0]}\n", "c.yaml:8: optimizer.betas: both betas must lie in [0, 1)"),
        (BASE + "tune: {targets: [a, 1]}\n", "c.yaml:8: tune.targets.1 should be a valid string, not 1; quote it"),
        (BASE + "labels: {source: scores}\n", "c.yaml:8: labels.source should be preference, scores.NAME or"),
        (BASE.replace("path: d", "split: train"), "c.yaml:4: data.path is missing; give data.path=..."),
        (BASE.replace("model:\n  path: m\n", ""), "model is missing; give model=..."),
        ("", "run_dir is missing"),
        ("- a\n", "c.yaml:1: a config is a mapping of sections"),
        (BASE + "train: {}\n", "c.yaml:8: train occurs twice in this section; delete one"),
        (BASE + "  steps: 30\n", "c.yaml:8: train.steps occurs twice"),
        (BASE + "tune: {rank: 4\n", "c.yaml:9: not valid YAML"),
        (BASE + "tune: \x07\n", "c.yaml: not valid YAML"),
        (BASE + "tune: &a {targets: *a}\n", "c.yaml:8: the anchor contains itself"),
        (BASE + "? [a]\n: 1\n", "c.yaml:8: a key must be a word, not a list"),
        (BASE + "seed: !!python/name:os.system x\n", "c.yaml:8: seed cannot be read"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in complaint(tmp_path, text)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=3", "argument 'train.stepz=3': unknown key train.stepz; did you mean steps?"),
        ("train.steps=many", "argument 'train.steps=many': train.steps should be a valid integer, not 'many'"),
        ("train.steps", "argument 'train.steps': write key.sub=value"),
        ("=3", "argument '=3': write key.sub=value"),
        ("train..steps=3", "argument 'train..steps=3': write key.sub=value"),
        ("model.path.x=3", "model.path is a value ('m', "),
        ("train.steps=[", "argument 'train.steps=[': not valid YAML"),
        ("data=null", "argument 'data=null': data.path is missing"),
        ("data=3", "argument 'data=3': data should be a section with keys, not 3"),
        ("tune={rank: 1, rank: 2}", "argument 'tune={rank: 1, rank: 2}': tune.rank occurs twice"),
        ("train={stepz: 3}", "argument 'train={stepz: 3}': unknown key train.stepz"),
    ],
)
def test_mistakes_in_an_argument_name_it(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in complaint(tmp_path, BASE, override)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["train.micro_batch=3"],
            "'train.micro_batch=3': train.micro_batch: 3 does not divide train.groups_per_step=8",
        ),
        (["train.micro_batch=30"], "whole groups; use 8, 4, 2, 1"),
        (["tune.kind=full", "tune.init=w"], "tune.init: init loads a LoRA, but tune.kind=full trains no LoRA"),
        (["tune.kind=full", "tune.targets=[to_q]"], "tune.targets: targets choose where a LoRA goes"),
        (["tune.kind=full", "model.dtype=float16"], "model.dtype: full fine-tuning updates the weights themselves"),
        (["device=cpu", "train.mixed_precision=fp16"], "train.mixed_precision: fp16 needs a GPU"),
        (["device=cpu", "model.attention=flash"], "model.attention: flash needs a GPU; use sdpa"),
        (["model.attention=flash", "train.mixed_precision=no"], "flash attention has no float32 kernel"),
        (["labels.transform=votes"], "labels.transform: preference holds vote shares already"),
        (
            ["labels.stats={min: 0, max: 1}", "labels.source=scores.a"],
            "labels.stats: statistics serve minmax, zscore and combined labels",
        ),
        (
            ["labels={source: scores.a, transform: minmax, stats: {mean: 0.0}}"],
            "labels.stats: minmax takes exactly max and min",
        ),
        (["times.std=2"], "times.std: mean and std shape logit_normal times only"),
        (["times.sampler=schedule"], "times.sampler: sampler=schedule and steps go together"),
        (["times={sampler: schedule, steps: 4, skip: 4}"], "times.skip: skip=4 leaves no time of 4 to draw"),
        (["times={sampler: schedule, steps: 4, shift: 3.0}"], "times.shift: the schedule has the model's own shift"),
        (["labels={source: scores.a, spread: group}"], "labels.spread: only advantages have a spread"),
        (
            ["labels={source: scores.a, transform: advantage, spread: group, stats: {std: 1.0}}"],
            "labels.stats: statistics serve minmax, zscore and combined labels, and advantages",
        ),
        (
            ["labels={source: scores.a, transform: zscore}", "objective.name=awm"],
            "labels.transform: awm takes advantages, which are above 0 for good images",
        ),
        (["optimizer.warmup_steps=20"], "optimizer.warmup_steps: the warm-up of 20 steps does not end within"),
        (["tracking.trackers=[wandb, wandb]"], "tracking.trackers: a tracker is named twice"),
        (["train.ema_decay=1"], "train.ema_decay should be less than 1, not 1"),
        (["train.ema_decay=0"], "train.ema_decay should be greater than 0, not 0"),
        (["data.resolution=100"], "data.resolution should be a multiple of 8, not 100"),
    ],
)
def test_impossible_combinations(tmp_path: Path, overrides: list[str], expected: str) -> None:
    assert expected in complaint(tmp_path, BASE, *overrides)


def test_a_combination_names_the_line_of_what_was_written(tmp_path: Path) -> None:
    text = BASE.replace("steps: 20", "micro_batch: 4\n  groups_per_step: 6")
    assert complaint(tmp_path, text).startswith("c.yaml:7: train.micro_batch: 4 does not divide")


def test_several_mistakes_are_counted_in_one_line(tmp_path: Path) -> None:
    message = complaint(tmp_path, BASE + "  stepz: 3\nnoise: x\nseed: y\n")
    assert message.startswith("c.yaml:8: unknown key train.stepz") and message.endswith("(also wrong: seed, noise)")


def test_sampling_needs_both_sides(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("model: {path: m}\nprompts: p.txt\nout: o\nheight: 64\n")
    with pytest.raises(DiffalignError, match=r"s\.yaml:4: height: give both height and width, or neither"):
        load_sample_config(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match="a folder, where a config file"):
        load_config(tmp_path)
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"run_dir: \xff\xfe")
    with pytest.raises(DiffalignError, match=r"b\.yaml: not a text file in UTF-8 \(byte 9\)"):
        load_config(binary)


# --- sections inside sections ----------------------------------------------------------------------------------

SYNTH = (
    "out: o\nprompts: {source: p.txt}\ngenerators:\n  - {name: a, model: {path: m}}\n  - {name: b, model: {path: m}}\n"
)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("rank.choose=extremes", "argument 'rank.choose=extremes': rank.choose: choose and k go together"),
        ("rank.weights={x: -1}", "argument 'rank.weights={x: -1}': rank.weights: a weight below 0"),
        (
            "generators.1.height=64",
            "argument 'generators.1.height=64': generators.1.height: give both height and width",
        ),
        (
            "generators.1.batch_size=0",
            "argument 'generators.1.batch_size=0': generators.1.batch_size should be greater",
        ),
        ("generators.1.name=a", "c.yaml:3: generators: a generator is named twice"),
        ("generators.2.name=c", "generators is a list (c.yaml:3); name an entry by its index (0 to 1)"),
        ("generators.b.name=c", "generators is a list (c.yaml:3); name an entry by its index (0 to 1)"),
        ("rewards=[]", None),
        ("generators.0.batch_size=4", None),
    ],
)
def test_a_check_of_a_nested_section_names_section_place_and_argument(
    tmp_path: Path, argument: str, expected: str | None
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(SYNTH)
    if expected is None:
        load_synth_config(path, [argument])
        return
    with pytest.raises(DiffalignError) as caught:
        load_synth_config(path, [argument])
    assert expected in str(caught.value).replace(str(path), "c.yaml")


def test_an_entry_of_a_list_is_reached_by_its_index(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(SYNTH)
    config = load_synth_config(path, ["generators.0.batch_size=4", "generators.1.model.dtype=bfloat16", "seed=3"])
    assert [one.batch_size for one in config.generators] == [4, 8]
    assert [one.model.dtype for one in config.generators] == ["auto", "bfloat16"]


def test_the_same_section_is_checked_wherever_it_stands(tmp_path: Path) -> None:
    text = "out: o\ntrain: shapes_sd3_gdro\ndata:\n  prompts: p.txt\n  rank:\n    k: 4\nevaluate: {prompts: q.txt}\n"
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(DiffalignError, match=r"c\.yaml:6: data\.rank\.k: choose and k go together"):
        load_rounds_config(path)
    with pytest.raises(DiffalignError, match=r"'data\.rank\.choose=random': data\.rank\.choose: "):
        load_rounds_config(path, ["data.rank.k=null", "data.rank.choose=random"])
    distill = "run_dir: r\nmodel: {path: m}\nprompts: p.txt\nfake:\n  optimizer: {offload: true, name: adafactor}\n"
    path.write_text(distill)
    with pytest.raises(DiffalignError, match=r"c\.yaml:5: fake\.optimizer\.offload: offload serves adamw"):
        load_distill_config(path)


# --- keys that other trainers have -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "argument", "meant"),
    [
        ("train", "lr=1e-5", "optimizer.lr"),
        ("train", "train.lr=1e-5", "optimizer.lr"),
        ("train", "learning_rate=1e-5", "optimizer.lr"),
        ("train", "train.batch_size=1", "train.groups_per_step or train.micro_batch"),
        ("train", "batch_size=1", "train.groups_per_step or train.micro_batch"),
        ("train", "rank=32", "tune.rank"),
        ("train", "model.rank=32", "tune.rank"),
        ("train", "network_dim=32", "tune.rank"),
        ("train", "max_train_steps=32", "train.steps"),
        ("train", "resolution=512", "data.resolution"),
        ("train", "gradient_checkpointing=true", "model.gradient_checkpointing"),
        ("train", "dpo_beta=3", "objective.beta"),
        ("train", "output_dir=x", "run_dir"),
        ("reward-gradient", "batch_size=4", "train.images_per_step or train.micro_batch"),
        ("reward-gradient", "cfg_scale=4", "sampler.guidance_scale"),
        ("distill", "lr=1", "optimizer.lr"),
        ("judge", "train.batch_size=1", "train.records_per_step or train.micro_batch"),
        ("train", "reward=pickscore", "validation.rewards"),
        ("train", "prompts=p.txt", "validation.prompts"),
        ("train", "method=dpo", "objective.name"),
        ("distill", "method=gndm", "group.size"),
    ],
)
def test_names_of_other_trainers(kind: str, argument: str, meant: str) -> None:
    recipes = {"train": "sdxl_dpo", "reward-gradient": "sdxl_refl", "distill": "sdxl_dmd2_4step"}
    with pytest.raises(DiffalignError) as caught:
        load(kind, recipes.get(kind, "shapes_judge_gdso"), [argument])
    key = argument.partition("=")[0]
    assert f"unknown key {key}; did you mean {meant}?" in str(caught.value)


@pytest.mark.parametrize("name", ["gdnm", "GNDM", "refl"])
def test_methods_of_other_verbs_are_no_objectives(name: str) -> None:
    written, verb = {"refl": ("ReFL", "reward-gradient")}.get(name, ("GNDM", "distill"))
    with pytest.raises(DiffalignError, match=f"unknown objective {name}; {written} is a method of `diffalign {verb}`"):
        load("train", "sdxl_dpo", [f"objective={name}"])


def test_a_slip_of_gndm_leads_to_its_recipes() -> None:
    with pytest.raises(DiffalignError, match=r"did you mean sd35_medium_gndm\?$"):
        load("distill", "sd35_medium_gdnm")
    with pytest.raises(DiffalignError, match=r"did you mean sd35_medium_gndm or sd3_medium_gndm or shapes_sd3_gndm\?$"):
        load("distill", "sdxl_gdnm")
