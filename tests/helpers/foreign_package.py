"""A small package with an objective and a reward of its own, installed beside ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

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
