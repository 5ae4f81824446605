"""What do 200 votes of a known taste teach a model, judged blind against its base, and what do random votes?

python benchmarks/own_taste.py [--seeds 0 1 2] [--votes 200] [--max-hours 2] [--tiny] [KEY=VALUE ...]

A cell is a seed and a rater on shapes-sd3. The rater chooses the redder of two pictures, and the other one in 10% of the votes;
the control chooses at random. Each votes on 4 pictures of each of 100 training prompts, through the sessions and the log of
`diffalign vote`. A personal reward is fitted, and a LoRA is trained with Diffusion-DPO on the votes. Then base and tuned model
draw held-out prompts, and the first rater, 10% noise included, votes blind on each pair. Intervals are over prompts.

The measure, the blind win rate, was fixed before any training. CPU-minutes are estimated from a few timed passes first.
A finished cell leaves cell.json and is not run again. Writes results/own-taste.json.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffalign.config import EvalConfig, PersonalConfig, RankConfig, SampleConfig, load_config
from diffalign.draws import draw
from diffalign.evaluation.compare import compare
from diffalign.files.images import decode
from diffalign.rewards import load_reward
from diffalign.stages import resolve
from diffalign.stages.evaluate import evaluate
from diffalign.stages.personal import fit
from diffalign.stages.quickstart import SAMPLING, sampling
from diffalign.stages.rank import rank
from diffalign.stages.sample import sample
from diffalign.stages.train import train
from diffalign.stages.vote_scores import sampler_of
from diffalign.vote_page.gallery import TUNED, Gallery, open_gallery
from diffalign.vote_page.session import Asked, Given, Sessions
from diffalign.voting.log import VoteLog, read_votes
from diffalign.voting.results import results

BASE, RECIPE = "shapes-sd3", "shapes_sd3_dpo"
RESULTS = Path(__file__).parent / "results"
NOISE = 0.1
RATERS = ("red", "random")
# Chosen on validation prompts with seed 9: see docs/own-taste.md.
SETTINGS: tuple[str, ...] = ()


@dataclass(frozen=True)
class Size:
    """prompts: for training, 4 pictures each; votes: on them; steps: of training; test: held-out prompts, a pair each."""

    prompts: int = 100
    votes: int = 200
    steps: int = 200
    test: int = 256


TINY = Size(prompts=30, votes=60, steps=2, test=10)
Rater = Callable[[Asked, list[Image.Image]], bool]
"""A function of a question and its pictures, left to right: whether the left one is chosen."""


def redness(image: Image.Image) -> float:
    """Mean of R - (G + B) / 2."""
    red, green, blue = np.asarray(image.convert("RGB"), np.float64).transpose(2, 0, 1)
    return float((red - (green + blue) / 2).mean())


def rater_of(kind: str, seed: int) -> Rater:
    def choose(asked: Asked, pictures: list[Image.Image]) -> bool:
        generator = draw(seed, f"own-taste rater {kind}", group=asked.id)
        if kind == "random":
            return bool(generator.random() < 0.5)
        redder_left = redness(pictures[0]) > redness(pictures[1])
        return redder_left != bool(generator.random() < NOISE)

    return choose


def vote(gallery: Gallery, rater: Rater, most: int, seed: int) -> None:
    """Answer questions as the page does, until `most` votes are in the log."""
    with VoteLog(gallery.log) as log:
        sessions = Sessions(gallery, log, sampler_of("balanced", 0.0, None), seed=seed, most=most)
        while queue := sessions.queue("me"):
            asked = queue[0]
            origins = gallery.origins[asked.question.group]
            left = rater(asked, [decode(origins[place].read()) for place in asked.order])
            sessions.vote("me", asked.id, Given("left" if left else "right"))


@dataclass(frozen=True)
class Cell:
    seed: int
    rater: str

    def folder(self, out: Path) -> Path:
        return out / f"{self.rater}-{self.seed}"


def pictures(seed: int, folder: Path, size: Size) -> Path:
    """Four pictures of each training prompt, drawn once for both raters."""
    model = load_config(RECIPE).model
    plan = SampleConfig(
        model=model,
        prompts="testbed:train",
        n=size.prompts,
        out=folder,
        seed=seed,
        images_per_prompt=4,
        **sampling(BASE),
    )
    sample(plan)
    return folder


def run_cell(cell: Cell, out: Path, size: Size, prompts: str, overrides: list[str]) -> None:
    folder = cell.folder(out)
    shared, own = pictures(cell.seed, out / f"pictures-{cell.seed}", size), folder / "data"
    if not own.is_dir():  # ranking writes into the dataset, so each rater has a copy
        shutil.copytree(shared, own.with_suffix(".part"), dirs_exist_ok=True)
        own.with_suffix(".part").rename(own)
    vote(open_gallery([own]), rater_of(cell.rater, cell.seed), size.votes, cell.seed)
    reward = fit(PersonalConfig(data=own, features="pixels", out=folder / "reward", device="cpu"))
    rank(RankConfig(data=own))
    given = [f"run_dir={folder / 'run'}", f"data.path={own}", f"seed={cell.seed}", f"train.steps={size.steps}"]
    config = load_config(RECIPE, [*given, "train.threads=1", "tracking.trackers=[]", *SETTINGS, *overrides])
    started = time.process_time()
    train(config)
    spent = time.process_time() - started
    evaluate(
        EvalConfig(
            model=config.model, weights=folder / "run" / "weights", prompts=prompts, n=size.test, out=folder / "run",
            seeds=1, reward={"name": "geneval", "detector": "shapes"}, **sampling(BASE),
        ),
        base_folder=out / "base",
    )  # fmt: skip
    # The blind vote: the first rater judges, whoever voted in training.
    pairs = open_gallery([folder / "run"])
    vote(pairs, rater_of("red", cell.seed + 100), size.test, cell.seed)
    write_cell(cell, folder, pairs, reward, spent)


def write_cell(cell: Cell, folder: Path, pairs: Gallery, reward: Path, spent: float) -> None:
    votes = read_votes(pairs.log)
    model = next(row for row in results(votes, {}, cell.seed).models if row.model == TUNED)
    wins = {vote.prompt: float((vote.models[0] == TUNED) == (vote.answer == "left")) for vote in votes}
    held_out = json.loads((reward / "personal.json").read_text())["held_out"]
    scorer = load_reward("personal", weights=reward)
    shown = {
        name: [decode(origin.read()) for own in pairs.origins for origin in own[n::2]]
        for n, name in enumerate(("base", TUNED))
    }
    means = {name: {
        "redness": float(np.mean([redness(image) for image in images])),
        "personal": float(scorer.score(images, [""] * len(images)).mean()),
    } for name, images in shown.items()}  # fmt: skip
    geneval = json.loads((folder / "run" / "eval.json").read_text())["scores"]["geneval.dense"]["all"]
    facts = {
        **asdict(cell), "win_rate": model.win_rate, "low": model.win_interval.low, "high": model.win_interval.high,
        "wins": wins, "held_out": held_out, "means": means, "training_cpu_seconds": spent,
        "geneval": {key: geneval[key] for key in ("base", "tuned", "difference", "low", "high")},
    }  # fmt: skip
    part = folder / "cell.part"
    part.write_text(json.dumps(facts, indent=1))
    part.rename(folder / "cell.json")


def estimate(todo: list[Cell], size: Size) -> float:
    """CPU-minutes of the cells that are left: a training pass counts three forwards, an image its steps twice."""
    config = load_config(RECIPE, list(SETTINGS))
    backbone = resolve.open_backbone(config.model, "cpu")
    conditioning = {k: v.repeat(16, *[1] * (v.dim() - 1)) for k, v in backbone.encode_prompts(["a circle"]).items()}
    side = backbone.default_resolution // backbone.vae_scale_factor
    x, t = torch.randn(16, backbone.latent_channels, side, side), torch.full((16,), 0.5 * backbone.process.span)
    times = []
    for _ in range(4):
        started = time.process_time()
        with torch.no_grad():
            backbone.predict(x, t, conditioning)
        times.append((time.process_time() - started) / 16)
    images = 4 * size.prompts * len({cell.seed for cell in todo}) + size.test * (len(todo) + 1)
    passes = 3 * 4 * config.train.groups_per_step * size.steps * len(todo) + 2 * SAMPLING["steps"] * images
    return min(times[1:]) * passes / 60


def table(done: list[dict[str, Any]]) -> tuple[str, dict[str, dict[str, float | None]]]:
    """Markdown of all cells, and the pooled win rates by rater."""
    lines = [
        "| rater, seed | blind win rate | 95% interval | reward right, held out | redness, base and tuned | GenEval's change |",
        "|---|---|---|---|---|---|",
    ]
    pooled = {}
    for rater in dict.fromkeys(cell["rater"] for cell in done):
        own = [cell for cell in done if cell["rater"] == rater]
        for cell in own:
            ends = "" if cell["low"] is None else f"{cell['low']:.1%} to {cell['high']:.1%}"
            red, dense = cell["means"], cell["geneval"]
            lines.append(
                f"| {rater}, {cell['seed']} | {cell['win_rate']:.1%} | {ends} | {cell['held_out']['accuracy']:.1%} | "
                f"{red['base']['redness']:.2f}, {red[TUNED]['redness']:.2f} | {dense['difference']:+.3f} |"
            )
        # Seeds share the prompts: averaged for each prompt before prompts are resampled.
        wins = np.array([[cell["wins"][prompt] for cell in own] for prompt in own[0]["wins"]])
        both = compare(np.zeros_like(wins), 2 * wins - 1)
        pooled[rater] = {"win_rate": both.win_rate, "low": both.win_low, "high": both.win_high}
        ends = "" if both.win_low is None else f"{both.win_low:.1%} to {both.win_high:.1%}"
        lines.append(f"| **{rater}, all** | **{both.win_rate:.1%}** | {ends} | | | |")
    return "\n".join(lines), pooled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--raters", nargs="+", default=list(RATERS), choices=RATERS)
    parser.add_argument("--votes", type=int, default=Size.votes)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-own-taste"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--prompts", default="testbed:test", help="testbed:validation is for choosing settings")
    parser.add_argument("--max-hours", type=float, default=2.0)
    parser.add_argument("--tiny", action="store_true", help="a few prompts and steps: does everything run?")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values of every training config")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    size = TINY if given.tiny else Size(votes=given.votes)
    out = given.out / given.prompts.replace(":", "-")
    wanted = [Cell(seed, rater) for seed in given.seeds for rater in given.raters]
    todo = [cell for cell in wanted if not (cell.folder(out) / "cell.json").is_file()]
    if todo:
        minutes = estimate(todo, size)
        print(f"{len(todo)} of {len(wanted)} cells to run, about {minutes:.0f} CPU-minutes", flush=True)
        if minutes > 60 * given.max_hours:
            sys.exit(f"more than --max-hours={given.max_hours:g}; choose fewer seeds")
    for cell in todo:
        print(f"\n=== rater {cell.rater}, seed {cell.seed}", flush=True)
        run_cell(cell, out, size, given.prompts, given.overrides)
    done = [json.loads((cell.folder(out) / "cell.json").read_text()) for cell in wanted]
    text, pooled = table(done)
    print(f"\n{text}")
    if given.prompts == "testbed:test" and not given.tiny:
        settings = {**asdict(size), "noise": NOISE, "settings": SETTINGS, "overrides": given.overrides}
        path = given.results / "own-taste.json"
        path.write_text(json.dumps({"settings": settings, "pooled": pooled, "cells": done}, indent=1) + "\n")
        print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
