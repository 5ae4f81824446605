"""Objectives and rewards of other packages: by entry point and as `module:Class`, and what is said after a mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign.config import load_config
from diffalign.config.objective import FOREIGN_SECTIONS
from diffalign.errors import DiffalignError
from diffalign.objectives import find_objective
from diffalign.report.curves import titles
from diffalign.rewards import foreign_rewards, load_reward, takes
from diffalign.scoring.spec import parse

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "another-package"
version = "1"

[project.entry-points."diffalign.objectives"]
hinge = "another_package.losses:Hinge"

[project.entry-points."diffalign.rewards"]
brightness = "another_package.judges:Brightness"

[tool.setuptools]
packages = ["another_package"]
"""
LOSSES = '''
from dataclasses import dataclass, field
from typing import ClassVar

from diffalign.objectives import GroupErrors, Objective, ObjectiveOutput
from diffalign.objectives.dpo import pair_loss

OTHER = 3


@dataclass(frozen=True)
class Hinge(Objective):
    """max(0, target - margin)."""

    beta: float = field(default=100.0, metadata={"gt": 0, "description": "strength"})
    target: float = 1.0
    upper: float = 2.0

    members: ClassVar = "best_worst"
    charts: ClassVar = {"short_of": ("Short of the target", "0 where it is reached")}

    def __post_init__(self):
        if self.target > self.upper:
            raise ValueError(f"target={self.target:g} should be at most upper={self.upper:g}")

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        short_of = (self.target - pair_loss(group, self.beta).metrics["margin"]).relu()
        return ObjectiveOutput(short_of, {"short_of": short_of})


class Thawed(Hinge):
    pass


@dataclass(frozen=True)
class Silent(Objective):
    pass


@dataclass(frozen=True)
class Named(Hinge):
    name: str = "x"


@dataclass(frozen=True)
class Unresolved(Hinge):
    how: "Nowhere" = 1
'''
JUDGES = '''
import torch

from diffalign.rewards import Reward


class Brightness(Reward):
    """Mean grey value, 0 to 1."""

    name, columns, range = "brightness", ("brightness",), (0.0, 1.0)
    licence, weights, reads = "MIT", "none", ()

    def __init__(self, scale: float = 1.0):
        self.scale, self.reasons = scale, []

    def options(self):
        return {"scale": self.scale}

    def measure(self, images, prompts, metadata=None):
        self.reasons = [""] * len(images)
        grey = [sum(image.convert("L").getdata()) / image.width / image.height / 255 for image in images]
        return {"brightness": self.scale * torch.tensor(grey, dtype=torch.float32)}


class Spaced(Brightness):
    name = "my reward/1"


class Nameless(Reward):
    columns, range, licence, weights = ("x",), (0.0, 1.0), "MIT", "none"

    def measure(self, images, prompts, metadata=None):
        return {}


class Silent(Reward):
    name, columns, range, licence, weights = "silent", ("x",), (0.0, 1.0), "MIT", "none"
'''
VERBS = """
import json, sys
from diffalign.cli import app
for arguments in json.loads(sys.argv[1]):
    try:
        app(arguments, prog_name="diffalign")
    except SystemExit as left:
        assert not left.code, (arguments, left.code)
"""


def write_package(folder: Path, **more: str) -> Path:
    """The package's sources; `more`: module -> text."""
    (folder / "another_package").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PROJECT)
    for module, text in {"__init__": "", "losses": LOSSES, "judges": JUDGES, **more}.items():
        (folder / "another_package" / f"{module}.py").write_text(text)
    return folder


def write_images(folder: Path) -> Path:
    """Two captioned pictures, a bright and a dark one, in `w` and `l`: winners and losers of equal names."""
    for side, grey in (("w", 200), ("l", 50)):
        (folder / side).mkdir(parents=True)
        for n in range(2):
            pixels = np.random.default_rng(n).integers(grey - 50, grey + 50, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / side / f"{n}.png")
            (folder / side / f"{n}.txt").write_text(f"picture number {n}")
    return folder


def training(run_dir: Path, objective: str, data: Path, model: Path) -> list[str]:
    """The arguments of two training steps; writes their config beside the run."""
    path = run_dir.with_suffix(".yaml")
    path.write_text(
        f"run_dir: {run_dir}\ndevice: cpu\nmodel: {{path: {model}, max_sequence_length: 12}}\n"
        f"data: {{path: {data}, resolution: 32}}\nobjective: {objective}\n"
        "train: {steps: 2, groups_per_step: 2, threads: 1}\ntracking: {trackers: []}\n"
    )
    return ["train", str(path)]


def run_verbs(*calls: list[str], first: Path, folder: Path) -> str:
    """Run verbs in one new process, with `first` before everything else on Python's path; returns what they said."""
    path = os.pathsep.join([str(first), *sys.path])
    done = subprocess.run(
        [sys.executable, "-P", "-c", VERBS, json.dumps(calls)],
        capture_output=True, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def rows_of(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_installed_package_trains_and_scores(tmp_path: Path, sd3_dir: Path) -> None:
    site = tmp_path / "site"
    source = write_package(tmp_path / "source")
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", site, source]
    subprocess.run([sys.executable, "-m", "pip", *map(str, install)], check=True, capture_output=True, text=True)
    images, data = write_images(tmp_path / "images"), tmp_path / "data"
    table = tmp_path / "scores.jsonl"
    by_class = "another_package.judges:Brightness"
    said = run_verbs(
        ["pairs", str(images / "w"), str(images / "l"), "--out", str(data)],
        training(tmp_path / "by_name", "{name: hinge, target: 0.5}", data, sd3_dir),
        training(tmp_path / "by_class", '{name: "another_package.losses:Hinge", target: 0.5}', data, sd3_dir),
        ["rewards"],
        ["score", str(images), "-r", "brightness", "-r", f"half={by_class}:scale=0.5", "-o", str(table)],
        ["score", str(data), "-r", by_class, "--into-dataset"],
        first=site,
        folder=tmp_path,
    )
    assert "brightness" in said
    for name in ("by_name", "by_class"):
        rows = rows_of(tmp_path / name / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2] and rows[0]["loss"] == rows[0]["short_of"] == 0.5
        assert "Short of the target" in (tmp_path / name / "report.html").read_text()
    for row in rows_of(table):
        expected = 200 / 255 if "/w/" in str(row["image"]) else 50 / 255
        assert row["brightness"] == pytest.approx(expected, abs=0.02)
        assert row["half"] == pytest.approx(row["brightness"] / 2, rel=1e-6)
    assert [path.name for path in (data / "scores").iterdir()] == ["brightness.parquet"]


# --- CONTRIBUTING.md, to the letter ----------------------------------------------------------------------------------


def checkout(folder: Path) -> Path:
    """A checkout of links to this one, with copies of what a contributor changes."""
    (folder / "diffalign").mkdir(parents=True)
    shutil.copy(ROOT / "diffalign" / "__init__.py", folder / "diffalign")
    shutil.copytree(ROOT / "diffalign" / "objectives", folder / "diffalign" / "objectives")
    shutil.copytree(ROOT / "rewards", folder / "rewards")
    for path in (
        *(ROOT / "diffalign").iterdir(),
        *(ROOT / name for name in ("pyproject.toml", "pipelines", "configs")),
    ):
        if not (folder / path.relative_to(ROOT)).exists():
            (folder / path.relative_to(ROOT)).symlink_to(path)
    return folder


def follow(section: str, root: Path) -> dict[str, int]:
    """Do what the code blocks of a section of CONTRIBUTING.md say. Returns file -> lines that were written."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    written: dict[str, int] = {}
    for kind, name, body in re.findall(r"^```(python|diff)\n ?# (\S+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        path, block = root / name, body.splitlines()
        if kind == "python":
            assert not path.exists()
            path.write_text(body)
            written[name] = len(block)
            continue
        lines, place = path.read_text().splitlines(), 0
        for line in block:
            # What is there tells where; what follows it is added.
            place = place + 1 if line.startswith("+") else lines.index(line[1:])
            if line.startswith("+"):
                lines.insert(place, line[1:])
        path.write_text("\n".join(lines) + "\n")
        written[name] = sum(line.startswith("+") for line in block)
    return written


def test_contributing_is_true_to_the_letter(tmp_path: Path, sd3_dir: Path) -> None:
    root = checkout(tmp_path / "checkout")
    for section, table in (
        ("A new method", "diffalign/objectives/__init__.py"),
        ("A new reward", "rewards/__init__.py"),
    ):
        written = follow(section, root)
        assert len(written) == 2 and written[table] == 2 and max(written.values()) < 50, written
    images, data, scores = write_images(tmp_path / "images"), tmp_path / "data", tmp_path / "scores.jsonl"
    for n, colour in enumerate([(255, 0, 0), (70, 70, 70)]):
        Image.new("RGB", (16, 16), colour).save(images / f"{n}.png")
    said = run_verbs(
        ["pairs", str(images / "w"), str(images / "l"), "--out", str(data)],
        training(tmp_path / "run", "{name: hinge, target: 0.5}", data, sd3_dir),
        ["rewards"],
        ["score", f"{images}/*.png", "-r", "colourfulness", "-o", str(scores)],
        first=root,
        folder=tmp_path,
    )
    assert "colourfulness" in said
    rows = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2 and rows[0]["loss"] == 0.5 and rows[0]["active"] == 1.0
    assert "Pairs that pull" in (tmp_path / "run" / "report.html").read_text()
    red, grey = (row["colourfulness"] for row in rows_of(scores))
    assert red == pytest.approx(0.3 * (255**2 + 127.5**2) ** 0.5, rel=1e-6) and grey == 0.0


# --- mistakes --------------------------------------------------------------------------------------------------------


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
