"""Recipes: what they state, what they extend, how they are listed and printed."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from diffalign.cli import app
from diffalign.config import (
    KINDS,
    OBJECTIVE_SECTIONS,
    config_path,
    list_recipes,
    load,
    load_config,
    recipes,
)
from diffalign.config.commented import commented_recipe, read_notes, reference
from diffalign.config.document import read_document
from diffalign.config.recipes import base_of
from diffalign.errors import DiffalignError
from helpers.configs import SMALL, kind_of, write

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
    base = base_of(config_path(name))
    below = read_notes(base)[1] if base else {}
    for note in {**below, **notes}.values():
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


DRAWN = {
    "train": "groups_per_step",
    "distill": "groups_per_step",
    "reward-gradient": "images_per_step",
    "judge": "records_per_step",
}


@pytest.mark.parametrize("name", sorted(name for name in recipes() if kind_of(name) in DRAWN))
@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_the_size_of_a_step_changes_with_one_argument(name: str, count: int) -> None:
    kind = kind_of(name)
    train = load(kind, name, [f"train.{DRAWN[kind]}={count}"]).model_dump()["train"]
    assert train[DRAWN[kind]] == count and count % (train["micro_batch"] or 1) == 0  # 0: auto


@pytest.mark.parametrize("name", sorted(name for name in recipes() if kind_of(name) in DRAWN))
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_a_step_is_shared_by_1_2_4_and_8_processes(name: str, processes: int) -> None:
    train = load(kind_of(name), name).model_dump()["train"]
    drawn, micro = train[DRAWN[kind_of(name)]], train["micro_batch"] or 1  # 0: auto, which divides a process's share
    if name.startswith("shapes_") and drawn < processes:
        return  # a test bench for a CPU, whose measured results belong to its few groups
    each, rest = divmod(drawn, processes)
    assert rest == 0 and each % min(micro, each) == 0, f"{name}: {drawn} in micro-batches of {micro} on {processes}"


@pytest.mark.parametrize("name", sorted(name for name in recipes() if kind_of(name) == "train"))
def test_the_objective_changes_with_one_argument(name: str) -> None:
    changed = load_config(name, ["objective.name=ipo"])
    if load_config(name).objective.name != "ipo":
        assert changed.objective == OBJECTIVE_SECTIONS["ipo"]()


def test_what_an_argument_leaves_without_meaning_is_dropped_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("sdxl_dpo", ["objective.name=ipo", "objective.beta=7"])
    assert config.objective.arguments() == {"beta": 7.0}
    assert load_config("flux_gdro", ["objective.name=ipo"]).objective.arguments() == {"beta": 2000.0}
    said = capsys.readouterr().err
    assert "objective.name=ipo replaces gdro of" in said and "its beta, tau, gamma are dropped" in said
    assert load_config("sdxl_dpo", ["train.groups_per_step=5"]).train.micro_batch == 5
    assert "note: train.micro_batch=8 of" in capsys.readouterr().err
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
        ("extends: mine\n", "config.yaml:1: extends mine, which extends sdxl_dpo itself"),
        ("extends: [a]\n", "config.yaml:1: extends takes the name of a recipe"),
        ("about: {task: x}\n", "config.yaml:1: about takes three texts"),
    ],
)
def test_mistakes_in_extends(tmp_path: Path, text: str, expected: str) -> None:
    write(tmp_path, "extends: sdxl_dpo\n", "mine.yaml")
    with pytest.raises(DiffalignError, match=expected):
        load_config(write(tmp_path, text))


def test_a_file_may_extend_a_recipe_that_has_a_base(tmp_path: Path) -> None:
    mine = write(tmp_path, "extends: sdxl_dpo_small\ntune: {rank: 4}\ndata: {path: d}\n", "mine.yaml")
    config = load_config(mine)
    small, base = load_config("sdxl_dpo_small"), load_config("sdxl_dpo")
    assert (config.tune.rank, config.data.path.name) == (4, "d")
    assert config.optimizer.lr == small.optimizer.lr != base.optimizer.lr
    assert config.model == small.model == base.model
    with pytest.raises(DiffalignError, match=r"sdxl_dpo\.yaml:\d+: tune.alpha|mine.yaml:2: .*rank"):
        load_config(write(tmp_path, "extends: sdxl_dpo_small\ntune: {rank: x}\n", "mine.yaml"))


# --- documentation ---------------------------------------------------------------------------------------------


def test_the_page_of_all_keys_is_what_the_schema_prints() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == reference(), "run `make docs`"
    for model in KINDS.values():
        for key in model.model_fields:
            assert f"{key}:" in page.read_text(encoding="utf-8"), key


def test_a_file_wins_over_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, SMALL, "sdxl_dpo")
    assert load_config("sdxl_dpo").model.path == "m"


def test_a_mistyped_recipe() -> None:
    with pytest.raises(DiffalignError, match="^sdxl_dpoo: neither a file nor a shipped recipe; did you mean sdxl_dpo"):
        load_config("sdxl_dpoo")
    with pytest.raises(DiffalignError, match="^zzz/qqq.yaml: .*; `diffalign recipes` lists the recipes$"):
        load_config("zzz/qqq.yaml")
    with pytest.raises(DiffalignError, match="^runs/sdxl: no such file or folder; `diffalign recipes`"):
        load_config("runs/sdxl")
