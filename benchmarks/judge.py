"""How do the ways to train a judge compare, in the form of Table 2 of Z-Reward (arXiv 2606.09076)?

    python benchmarks/judge.py

On the embedded world. Teachers (base, SFT, GRPO, GDSO) reason before they score; students (base, SFT, OPD, RISD) learn from
the same pairs or from a teacher, and answer in one token, OPD with reasons. All are measured on prompts of another split. A
cell is a method and a seed; a finished cell leaves cell.json and is not run again, and a run within a cell resumes from its
checkpoint. The CPU-hours are estimated from a timed pass of either model and said first; more than --max-hours is refused.
Settings are chosen with --split validation.

Fixed before any training: the measures of `diffalign judge-eval`, and for RISD's student the share of images without a
fault whose alignment score falls when the image is blanked, and when the prompt is exchanged for one that it does not show.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffalign.config import load_judge_config
from diffalign.judge.evaluation import COLUMNS
from diffalign.judge.forward import Sample
from diffalign.judge.predict import Thinking, predict
from diffalign.rewards.judge import Judge, load_judge
from diffalign.stages import judge as judge_stage
from diffalign.testbed.judge_base import BaseSettings, base_loss, make_base, samples, untrained_judge
from diffalign.testbed.judge_data import faulty_image, random_prompt
from diffalign.testbed.scenes import GROUND, SIZE

RESULTS = Path(__file__).parent / "results"
TEACHERS, STUDENTS = ("base", "sft", "grpo", "gdso"), ("base", "sft", "opd", "risd")
TEACHING = "gdso"  # the teacher whose distributions RISD learns, and that OPD asks


@dataclass(frozen=True)
class Size:
    """groups: prompts of training and of evaluation; base: steps of the bases; cases: of the two checks."""

    base: int = 3_000
    groups: int = 900
    test_groups: int = 150
    sampled: int = 200
    direct: int = 400
    traces: int = 4
    max_tokens: int = 24
    records: int = 8
    cases: int = 500


TINY = Size(base=2, groups=6, test_groups=6, sampled=1, direct=2, traces=2, max_tokens=3, records=2, cases=6)


@dataclass(frozen=True)
class Cell:
    role: str
    method: str
    seed: int

    @property
    def reasons(self) -> bool:
        return self.role == "teacher" or self.method == "opd"

    @property
    def sampled(self) -> bool:
        return self.method in ("grpo", "gdso", "opd")

    def folder(self, out: Path) -> Path:
        return out / f"seed-{self.seed}" / f"{self.role}-{self.method}"

    def weights(self, out: Path) -> Path:
        return self.folder(out) / ("weights" if self.method == "base" else "run/weights")


def cells(seeds: list[int]) -> list[Cell]:
    """In an order in which each finds what it needs."""
    order = [("teacher", method) for method in TEACHERS] + [("student", method) for method in STUDENTS]
    return [Cell(role, method, seed) for seed in seeds for role, method in order]


def overrides(cell: Cell, out: Path, size: Size) -> list[str]:
    data = out / f"seed-{cell.seed}" / "train"
    given = [
        f"run_dir={cell.folder(out) / 'run'}", f"seed={cell.seed}", f"role={cell.role}", f"method={cell.method}",
        f"model.path={Cell(cell.role, 'base', cell.seed).weights(out)}", "tracking.trackers=[]", "tune.kind=full",
        f"rollout.traces={size.traces}", f"rollout.max_tokens={size.max_tokens}",
    ]  # fmt: skip
    if cell.method == "risd":
        given += ["data.pairs=null", f"data.distributions={data / 'distributions.jsonl'}"]
    else:
        given += ["data.distributions=null", f"data.pairs={data / 'pairs.jsonl'}"]
    if cell.method == "opd":
        given.append(f"teacher={Cell('teacher', TEACHING, cell.seed).weights(out)}")
    # A step that samples sees records x 2 x traces answers, one that does not four times as many images.
    records = size.records if cell.sampled else 4 * size.records
    steps = size.sampled if cell.sampled else size.direct
    rate = "2e-4" if cell.role == "teacher" else "5e-4"
    return [
        *given, f"train.steps={steps}", f"train.records_per_step={records}", f"train.micro_batch={records}",
        f"optimizer.lr={rate}",
    ]  # fmt: skip


def run_cell(cell: Cell, out: Path, size: Size, split: str, more: list[str]) -> None:
    folder, home = cell.folder(out), out / f"seed-{cell.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    judge_stage.judge_data(home / "train", "train", size.groups, 4, 5, cell.seed)
    judge_stage.judge_data(home / "held-out", split, size.test_groups, 4, 5, cell.seed)
    spent = time.process_time()
    if cell.method == "base":
        if not (cell.weights(out) / "judge.json").is_file():
            make_base(cell.weights(out), cell.role, cell.seed, BaseSettings(steps=size.base))
    else:
        taught = home / "train" / "distributions.jsonl"
        if cell.method == "risd" and not taught.is_file():
            teacher = Cell("teacher", TEACHING, cell.seed).weights(out)
            thinking = Thinking(1, size.max_tokens, 1.0, 64)
            judge_stage.distributions(teacher, home / "train" / "ratings.jsonl", taught, thinking, "cpu", cell.seed)
        judge_stage.train_from_config(load_judge_config("shapes_judge_gdso", [*overrides(cell, out, size), *more]))
    spent = time.process_time() - spent
    thinking = Thinking(1 if cell.reasons else 0, size.max_tokens, 1.0, 64)
    rows = judge_stage.evaluate_judge(
        cell.weights(out), home / "held-out" / "ratings.jsonl", folder / "eval.json", thinking, "cpu", cell.seed
    )
    facts: dict[str, Any] = {**asdict(cell), "training_cpu_seconds": spent, "measures": rows}
    if cell.role == "student" and cell.method == "risd":
        facts["right_way"] = right_way(load_judge(cell.weights(out)), folder, split, size.cases, cell.seed)
    part = folder / "cell.part"
    part.write_text(json.dumps(facts, indent=1))
    part.rename(folder / "cell.json")


def right_way(judge: Judge, folder: Path, split: str, cases: int, seed: int) -> dict[str, float]:
    """Shares of images without a fault whose alignment score falls: on a blank image, and under another image's prompt."""
    pictures = folder / "cases"
    pictures.mkdir(exist_ok=True)
    blank = pictures / "blank.png"
    Image.new("RGB", (SIZE, SIZE), GROUND).save(blank)
    own, empty, swapped = [], [], []
    for case in range(cases):
        rng = np.random.default_rng([seed, case, 17])
        shown = random_prompt(split, rng)
        other = random_prompt(split, rng)
        # A prompt that asks for nothing but what is there would rightly keep its score.
        while {c["class"] for c in other["include"]} & {c["class"] for c in shown["include"]}:
            other = random_prompt(split, rng)
        path = pictures / f"{case}.png"
        faulty_image(shown, "alignment", 0, rng).image.save(path)
        own.append(Sample(shown["prompt"], "alignment", path))
        empty.append(Sample(shown["prompt"], "alignment", blank))
        swapped.append(Sample(other["prompt"], "alignment", path))
    levels = torch.linspace(1, 5, 9)
    told = [
        predict(judge, part, Thinking(0, batch_size=64), seed).probabilities @ levels for part in (own, empty, swapped)
    ]
    return {
        "cases": float(cases),
        "blank_image": float((told[0] > told[1]).float().mean()),
        "other_prompt": float((told[0] > told[2]).float().mean()),
    }


def seconds_of(work: Callable[[], Any]) -> float:
    """CPU-seconds, the better of two."""
    times = []
    for _ in range(2):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def estimate(todo: list[Cell], size: Size) -> float:
    """CPU-hours of the cells that are left, from an image's learning pass of either model: sampling counts as one more."""
    each = {}
    for role in ("teacher", "student"):
        judge, shown = untrained_judge(role), samples(0, 0, 16)
        each[role] = (
            seconds_of(lambda j=judge, s=shown: base_loss(j, s, BaseSettings(), np.random.default_rng(0)).backward())
            / 16
        )
    total = 0.0
    for cell in todo:
        answers = (
            size.records * 2 * size.traces * size.sampled * 2.5 if cell.sampled else 8 * size.records * size.direct
        )
        if cell.method == "base":
            answers = size.base * BaseSettings().batch
        evaluated = size.test_groups * 4 * (2 if cell.reasons else 1) + (3 * size.cases if cell.method == "risd" else 0)
        total += each[cell.role] * (answers + evaluated)
        if cell.method == "opd":
            total += each["teacher"] * size.records * 2 * size.traces * size.sampled / 3
        if cell.method == "risd":
            total += each["teacher"] * size.groups * 4
    return total / 3600


def table(done: list[dict[str, Any]]) -> str:
    """Markdown, means over seeds and the spread of the first four."""
    lines = [f"| judge | seeds | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for key in dict.fromkeys((c["role"], c["method"]) for c in done):
        own = [c["measures"]["all"] for c in done if (c["role"], c["method"]) == key]
        values = []
        for place, column in enumerate(COLUMNS):
            numbers = np.array([row[column] for row in own])
            spread = f" ± {numbers.std(ddof=1):.4f}" if place < 4 and len(own) > 1 else ""
            values.append(f"{numbers.mean():.4f}{spread}" if place < 6 else f"{numbers.mean():.1f}")
        lines.append(f"| {key[0]} {key[1].upper()} | {len(own)} | {' | '.join(values)} |")
    for cell in done:
        if "right_way" in cell:
            told = cell["right_way"]
            lines.append(
                f"\nSeed {cell['seed']}, {told['cases']:.0f} cases: the score falls on a blank image in "
                f"{told['blank_image']:.1%}, under another prompt in {told['other_prompt']:.1%}."
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-judge"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--split", default="test", choices=["validation", "test"], help="validation is for choosing settings"
    )
    parser.add_argument("--max-hours", type=float, default=8.0)
    parser.add_argument("--tiny", action="store_true", help="a few steps and images: does everything run?")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values of every training config")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    size = TINY if given.tiny else Size()
    out = given.out / ("tiny" if given.tiny else "full") / given.split
    wanted = cells(given.seeds)
    todo = [cell for cell in wanted if not (cell.folder(out) / "cell.json").is_file()]
    if todo:
        hours = estimate(todo, size)
        print(f"{len(todo)} of {len(wanted)} cells to run, about {hours:.2f} CPU-hours", flush=True)
        if hours > given.max_hours:
            sys.exit(f"more than --max-hours={given.max_hours:g}; choose fewer seeds")
    for cell in todo:
        print(f"\n=== {cell.role} {cell.method}, seed {cell.seed}", flush=True)
        run_cell(cell, out, size, given.split, given.overrides)
    done = [json.loads((cell.folder(out) / "cell.json").read_text()) for cell in wanted]
    print("\n" + table(done))
    if given.split == "test" and not given.tiny:
        told = {"size": {**asdict(size), "overrides": given.overrides}, "cells": done}
        (given.results / "judge.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
