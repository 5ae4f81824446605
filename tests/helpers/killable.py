"""Six small jobs, one for each kind of stage, that tests kill or signal in forked children and run again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from PIL import Image
from safetensors import safe_open

from diffalign.cli import errors
from diffalign.config import load_judge_config, load_synth_config
from diffalign.stages import synth
from diffalign.stages.judge import train_from_config
from helpers import counting_reward, toy, toy_distill, toy_reward_gradient
from helpers.judge_run import make_judge_run
from helpers.processes import in_a_child
from helpers.small_datasets import quiet
from helpers.synth_models import CONFIG, Channel, Painter

PAUSE = 0.02
"""Seconds that a step or batch takes besides its work, so that signals find it at work."""
TRIES = 6
CLOCKS = ("timing.jsonl", "report.html", ".lock")
STEPS: dict[str, Any] = {"train": {"steps": 30}, "checkpoint": {"every": 7}}
"""What a signal finds at work."""


class SlowReward(counting_reward.Counting):
    def measure(self, *given: Any) -> dict[str, torch.Tensor]:
        time.sleep(PAUSE)
        return super().measure(*given)


def train(folder: Path, inputs: Path) -> None:
    averaged = {"steps": 30, "ema_decay": 0.9, "skip_grad_norm": 3.0}
    config = toy.toy_config(folder / "run", **{**STEPS, "train": averaged}, validation={"every": 4, "prompts": "p.txt"})
    backbone = toy.ToyBackbone()
    script = {step: float(np.sin(step)) for step in range(31)}
    validation = toy.Scripted(backbone, config.validation, [], {}, {}, 8, 0, script)
    toy.train(
        config, backbone=backbone, source=toy.SlowSource(toy.ToySource(), PAUSE), say=quiet, validation=validation
    )


def distill(folder: Path, inputs: Path) -> None:
    config = toy_distill.toy_config(folder / "run", train={"steps": 15, "ema_decay": 0.9}, checkpoint={"every": 4})
    toy_distill.run(config, source=toy.SlowSource(toy_distill.ToyPrompts(), PAUSE))


def reward_gradient(folder: Path, inputs: Path) -> None:
    config = toy_reward_gradient.toy_config(folder / "run", **STEPS)
    toy_reward_gradient.run(config, source=toy.SlowSource(toy_distill.ToyPrompts(), PAUSE))


def judge(folder: Path, inputs: Path) -> None:
    train_from_config(load_judge_config(inputs / "judge.yaml", [f"run_dir={folder / 'run'}"]))


def draw_and_rank(folder: Path, inputs: Path) -> None:
    synth.open_reward = lambda section, device: Channel(section.name)  # type: ignore[assignment,return-value]
    synth.open_generator = lambda section, device: Painter(section.name, None, PAUSE)  # type: ignore[assignment,return-value]
    synth.synth(load_synth_config(inputs / "synth.yaml", [f"out={folder / 'data'}"]))


def score(folder: Path, inputs: Path) -> None:
    counting_reward.run([inputs / "pictures"], folder / "scores.jsonl", SlowReward())


JOBS: dict[str, Callable[[Path, Path], None]] = {
    "train": train, "distill": distill, "reward-gradient": reward_gradient, "judge": judge,
    "synth": draw_and_rank, "score": score,
}  # fmt: skip
TRAINERS = ("train", "distill", "reward-gradient", "judge")


def make_inputs(folder: Path) -> Path:
    """Write what the jobs read."""
    make_judge_run(folder, groups=5, steps=8, every=2)
    (folder / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(21)))
    (folder / "synth.yaml").write_text(CONFIG.replace("PROMPTS", str(folder / "prompts.txt")))
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(60):
        picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        picture.save(folder / "pictures" / f"{i:02d}.png")
        (folder / "pictures" / f"{i:02d}.txt").write_text(f"prompt {i}")
    return folder


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit code, or the negative number of the signal that killed it."""

    code: int
    seconds: float


def ends(name: str, folder: Path, inputs: Path, number: signal.Signals | None = None, after: float = 0.0) -> Outcome:
    """Run a job in a child as the command line would; send it a signal `after` so many seconds."""
    folder.mkdir(parents=True, exist_ok=True)

    def work() -> None:
        silence()
        os.chdir(folder)  # the same relative paths in every trial, since runs write them down
        try:
            with errors.plain_errors(resumes=True):
                JOBS[name](Path(), inputs)
        except typer.Exit as left:
            os._exit(left.exit_code)

    child, started = in_a_child(work), time.monotonic()
    if number is not None:
        time.sleep(after)
        os.kill(child, number)  # a child that has ended is a zombie until it is waited for, so nobody else is hit
    _, status = os.waitpid(child, 0)
    return Outcome(os.waitstatus_to_exitcode(status), time.monotonic() - started)


def silence() -> None:
    """Send what a child prints to nowhere; its parent reads folders."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def content(folder: Path) -> dict[str, Any]:
    """Return everything in a folder that has no clock in it; of safetensors the tensors and the sorted metadata."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or any(clock in name for clock in CLOCKS) or "tensorboard" in name:
            continue
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                found[name] = ({key: file.get_tensor(key).tobytes() for key in sorted(file.keys())}, file.metadata())
        else:
            found[name] = path.read_bytes()
    return found


@dataclass(frozen=True)
class Trial:
    """One interrupted run. hit: whether the signal found it at work; same: whether its end equals the undisturbed one's."""

    job: str
    code: int
    hit: bool
    same: bool
    different: tuple[str, ...] = ()


class Undisturbed:
    """What undisturbed runs leave behind, and how long they take; each is run when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.inputs = folder, make_inputs(folder / "inputs")
        self._known: dict[str, tuple[dict[str, Any], float]] = {}

    def __getitem__(self, name: str) -> tuple[dict[str, Any], float]:
        if name not in self._known:
            place = self.folder / "undisturbed" / name
            outcome = ends(name, place, self.inputs)
            assert outcome.code == 0, f"{name} ended with {outcome.code}"
            self._known[name] = content(place), outcome.seconds
        return self._known[name]

    def trial(self, name: str, number: int, how: signal.Signals) -> Trial:
        """Send `how` at a random moment (keyed by `number`), run again until it is through, and compare."""
        expected, seconds = self[name]
        rng, place = random.Random(f"{name} {number} {how}"), self.folder / f"{how.name}-{number}-{name}"
        first = Outcome(0, seconds)
        for attempt in range(TRIES):  # a job that had ended before the signal came shows nothing
            shutil.rmtree(place, ignore_errors=True)
            first = ends(name, place, self.inputs, how, rng.uniform(0.02, 0.9) * seconds * 0.6**attempt)
            if first.code != 0:
                break
        outcome, again = first, 0
        while outcome.code != 0 and again < 3:
            outcome, again = ends(name, place, self.inputs), again + 1
        found = content(place)
        keys = sorted(found.keys() | expected.keys())
        different = tuple(key for key in keys if found.get(key) != expected.get(key))
        return Trial(name, first.code, first.code != 0, outcome.code == 0 and not different, different)
