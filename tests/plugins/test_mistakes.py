"""Objectives and rewards of other packages that cannot be used: one line that says why."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from diffalign.config import load_config
from diffalign.config.objective import FOREIGN_SECTIONS
from diffalign.errors import DiffalignError
from diffalign.objectives import find_objective
from diffalign.report.curves import titles
from diffalign.rewards import foreign_rewards, load_reward, takes
from diffalign.scoring.spec import parse
from helpers.foreign_package import (
    write_package,
)


def offer(folder: Path, name: str, **entries: str) -> None:
    """What pip writes of a package's entry points; a double underscore parts group and name."""
    info = folder / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    lines = [f"[diffalign.{key.split('__')[0]}]\n{key.split('__')[1]} = {value}\n" for key, value in entries.items()]
    (info / "entry_points.txt").write_text("".join(lines))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package on Python's path, without entry points."""
    broken = {"crashes": "1 / 0\n", "needs": "import a_module_that_is_not_there\n"}
    folder = write_package(tmp_path / "source", **broken)
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "another_package"]:
        monkeypatch.delitem(sys.modules, name)
    FOREIGN_SECTIONS.clear()  # they belong to another test's module
    return folder


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hinje", "unknown objective 'hinje': there are dpo, sft,"),
        ("gone.losses:Hinge", "gone.losses:Hinge: there is no module gone; install its package, or put its folder on"),
        ("another_package.loses:Hinge", ": there is no module another_package.loses; install"),
        ("another_package.losses:Hinje", ": another_package.losses has no class Hinje"),
        ("another_package.losses:OTHER", "OTHER is no subclass of diffalign.objectives.base.Objective"),
        ("another_package.judges:Brightness", "is no subclass of diffalign.objectives.base.Objective"),
        ("another_package.losses:Thawed", "an objective is a frozen dataclass with a __call__, and Thawed is not"),
        ("another_package.losses:Silent", "an objective is a frozen dataclass with a __call__, and Silent is not"),
        (
            "another_package.crashes:X",
            "another_package.crashes cannot be imported: ZeroDivisionError: division by zero",
        ),
        ("another_package.needs:X", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("a b:X", "a b:X: write module:Class, such as my_package.losses:MyLoss"),
        ("a:b:c", "a:b:c: write module:Class"),
    ],
)
def test_a_wrong_name_is_explained_in_one_line(package: Path, name: str, said: str) -> None:
    with pytest.raises(DiffalignError) as caught:
        find_objective(name)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("another_package.losses:Hinge", "is no subclass of diffalign.rewards.base.Reward"),
        ("another_package.judges:Silent", "Silent is no complete reward, it has no measure"),
        ("another_package.judges:Nameless", "Nameless is no complete reward, it has no name"),
        ("another_package.judges:Spaced", "its class calls itself 'my reward/1'; use letters, digits, - and _ alone"),
    ],
)
def test_a_class_that_is_no_reward(package: Path, name: str, said: str) -> None:
    with pytest.raises(DiffalignError) as caught:
        load_reward(name)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_names_that_clash(package: Path) -> None:
    here = "another_package.judges:Brightness"
    offer(package, "one", objectives__hinge="another_package.losses:Hinge", rewards__sharpness=here)
    assert find_objective("hinge").__name__ == "Hinge"
    offer(package, "two", objectives__hinge="two.losses:Hinge", objectives__dpo="two:DPO", rewards__bright=here)
    with pytest.raises(
        DiffalignError, match=r"^hinge: several installed packages have this name; write another_package"
    ):
        find_objective("hinge")
    assert find_objective("dpo").__module__ == "diffalign.objectives.dpo"  # ours wins, and theirs is not even imported
    found, problems = foreign_rewards()
    assert not found and len(problems) == 2
    assert problems[0] == "bright: its class calls itself 'brightness'; give the entry point the same name"
    assert problems[1].startswith("sharpness: another package gives its reward the name of ours")


def test_a_reward_on_the_command_line(package: Path) -> None:
    spec = parse("another_package.judges:Brightness")
    assert (spec.label, spec.name, spec.options) == ("brightness", "another_package.judges:Brightness", {})
    spec = parse("b=another_package.judges:Brightness:scale=2,x=a:b")
    assert (spec.label, spec.name, spec.options) == ("b", "another_package.judges:Brightness", {"scale": 2, "x": "a:b"})
    with pytest.raises(DiffalignError, match="option 'threshold' is not key=value"):
        parse("geneval:threshold")  # a reward of ours has no classes
    with pytest.raises(DiffalignError, match="has no class Darkness"):
        parse("another_package.judges:Darkness:scale=2")
    assert takes(spec.name, "scale") and not takes(spec.name, "device") and not takes("nothing", "device")
    with pytest.raises(DiffalignError, match="unknown option 'skale'; did you mean 'scale'"):
        load_reward(spec.name, skale=1)


BASE = "run_dir: runs/x\nmodel: {path: m}\ndata: {path: d}\n"


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("{name: 'another_package.losses:Hinge', bata: 3}", ":4: unknown key objective.bata; did you mean beta?"),
        ("{name: 'another_package.losses:Hinge', beta: 0}", ":4: objective.beta should be greater than 0, not 0"),
        ("{name: 'another_package.losses:Hinge', target: 3}", ":4: objective: target=3 should be at most upper=2"),
        (
            "{name: 'another_package.losses:Hinje'}",
            ":4: objective: another_package.losses:Hinje: another_package.losses",
        ),
        ("{name: 'another_package.losses:Named'}", "Named make no section of a config: the name 'name' is taken"),
        ("{name: 'another_package.losses:Unresolved'}", "make no section of a config: name 'Nowhere' is not defined"),
        ("{name: hinje}", ":4: unknown objective hinje; known: dpo, sft"),
    ],
)
def test_a_config_with_another_packages_objective(package: Path, tmp_path: Path, objective: str, said: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(BASE + f"objective: {objective}\n")
    with pytest.raises(DiffalignError) as caught:
        load_config(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_keeps_another_packages_objective(package: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(BASE + "objective: {name: 'another_package.losses:Hinge', target: 2}\n")
    config = load_config(path, ["objective.beta=7"])
    written = {"name": "another_package.losses:Hinge", "beta": 7.0, "target": 2.0, "upper": 2.0}
    assert config.model_dump()["objective"] == config.objective.model_dump() == written
    assert type(config).model_validate(config.model_dump()) == config
    assert config.objective.build() == find_objective("another_package.losses:Hinge")(7.0, 2.0)
    assert titles(["another_package.losses:Hinge"])["short_of"][0] == "Short of the target"
    changed = load_config("sdxl_dpo", ["objective.name=another_package.losses:Hinge"])  # dpo's keys are dropped
    assert changed.objective.build() == find_objective("another_package.losses:Hinge")()
    with pytest.raises(DiffalignError, match="auto_beta needs a beta and one margin a group"):
        load_config(path, ["train.auto_beta=0.3"])
