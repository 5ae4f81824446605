"""How do the objectives compare, with true and shuffled labels, at an equal budget of image-forwards?

python benchmarks/objectives.py [--bases shapes-sdxl shapes-sd3] [--seeds 0 1 2] [--max-hours 8] [--tiny]
python benchmarks/objectives.py --prompts testbed:validation --methods GDRO --out FOLDER optimizer.lr=0.002
                                                  to choose settings: prints the scores and writes no table

On the embedded world. A cell is a method, a base and a seed. Every cell may spend the same number of image-forwards: forward
passes of one image through policy, reference or inversion (a backward goes with each pass of the policy). The CPU-hours are
estimated from a few timed passes and said first; more than --max-hours is refused. A finished cell leaves cell.json and is
not run again.

The measures were fixed before any training: the dense and the exact GenEval score on held-out prompts and on prompts of
kinds that no training caption has (three objects, a number and an object, five), drift from the reference in training,
diversity of images of one prompt, and CPU-seconds per step on one thread. Intervals are bootstrapped over prompts.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from diffalign.config import EvalConfig, SampleConfig, load_config
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.rank import rank
from diffalign.data.real_against_generated import write_real_against_generated
from diffalign.draws import draw
from diffalign.evaluation.compare import compare, pool
from diffalign.evaluation.evaluate import load_scores
from diffalign.rewards import find_reward
from diffalign.stages import resolve
from diffalign.stages.data import cache
from diffalign.stages.evaluate import evaluate
from diffalign.stages.quickstart import RECIPES, REWARD, SAMPLING, make_data, sampling
from diffalign.stages.real_images import prompts_file, real_images
from diffalign.stages.sample import sample
from diffalign.stages.train import train
from shared.objectives_report import table, write_report
from shared.unseen_prompts import out_of_distribution

RESULTS = Path(__file__).parent / "results"
MEASURES = ("geneval.dense", "geneval.exact")
GROUPS_PER_STEP = 8


@dataclass(frozen=True)
class Method:
    """`recipe`: the shapes recipe that it starts from; `forwards`: image-forwards of a group in a step.

    `chosen`: what was chosen on validation prompts for a base and differs from the recipe's. `roles`: learns rendered scenes
    against unguided images of the base, one each a prompt, and needs no scores.
    """

    recipe: str
    forwards: int
    overrides: tuple[str, ...] = ()
    control: bool = False
    chosen: tuple[tuple[str, str], ...] = ()
    bases: tuple[str, ...] = tuple(RECIPES)
    roles: bool = False

    def settings(self, base: str) -> tuple[str, ...]:
        return (*self.overrides, *(value for name, value in self.chosen if name == base))


FLOW = ("shapes-sd3",)  # the wider family has recipes for the flow model alone
# An inversion in n = 1..5 steps, 3 on average, has two passes a step and image.
METHODS: dict[str, Method] = {
    "SFT on the best image": Method(
        "dpo",
        1,
        ("objective={name: sft}",),
        chosen=(("shapes-sd3", "optimizer.lr=0.0002"), ("shapes-sdxl", "optimizer.lr=0.0001")),
    ),
    "DPO, best against worst": Method("dpo", 4),
    "DPO, all pairs of 4": Method("rankdpo", 8, ("objective.pair_weight=none",)),
    "RankDPO, 4": Method("rankdpo", 8, control=True),
    "SmPO, shared noise": Method(
        "smpo", 4, ("noise=shared", "inversion={}"), chosen=(("shapes-sd3", "optimizer.lr=0.001"),)
    ),
    "SmPO, inverted noise": Method("smpo", 4 + 2 * 2 * 3, control=True),
    "GDRO, 6": Method("gdro", 12, control=True),
    "IPO": Method("ipo", 4, bases=FLOW),
    "SimPO": Method("simpo", 2, bases=FLOW),
    "MADPO": Method("madpo", 4, ("objective.shape=exponential", "objective.hard=4.0"), bases=FLOW),
    "Constrained DPO": Method("constrained", 4, bases=FLOW),
    "DisCO, 6": Method("disco", 12, bases=FLOW),
    "DDO, real against generated": Method("ddo", 4, bases=FLOW, roles=True),
}


@dataclass(frozen=True)
class Size:
    """How large the benchmark is."""

    groups: int = 256
    budget: int = 9_600
    prompts: int = 256
    out_of_distribution: int = 64
    seeds_per_prompt: int = 2


CHOOSING = Size(prompts=192, out_of_distribution=0)
TINY = Size(groups=8, budget=128, prompts=6, out_of_distribution=6, seeds_per_prompt=2)


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).replace("--", "-").strip("-")


def shuffle_scores(folder: Path, seed: int) -> None:
    """Give the scores of each group to its images in another order: what no method may profit from."""
    path = folder / "scores" / f"{REWARD['name']}.parquet"
    table = pq.read_table(path)
    groups = np.array(table["group_id"].to_pylist())
    source = np.arange(len(groups))
    for group in dict.fromkeys(groups.tolist()):
        rows = np.flatnonzero(groups == group)
        source[rows] = draw(seed, "shuffle", group=group).permutation(rows)
    shuffled = table.take(source)
    for key in ("group_id", "index"):
        shuffled = shuffled.set_column(shuffled.schema.get_field_index(key), key, table[key])
    pq.write_table(shuffled, path)


@dataclass(frozen=True)
class Cell:
    base: str
    method: str
    seed: int
    shuffled: bool

    def folder(self, out: Path) -> Path:
        return out / self.base / f"{slug(self.method)}-{'shuffled' if self.shuffled else 'true'}-{self.seed}"


def cells(bases: list[str], seeds: list[int], methods: list[str], controls: bool) -> list[Cell]:
    return [
        Cell(base, name, seed, shuffled)
        for base in bases
        for seed in seeds
        for name, method in METHODS.items()
        if base in method.bases and any(name.startswith(wanted) for wanted in methods)
        for shuffled in ((False, True) if method.control and controls else (False,))
    ]


def steps_of(method: Method, size: Size) -> int:
    return max(1, round(size.budget / (GROUPS_PER_STEP * method.forwards)))


def prepare_data(base: str, seed: int, shuffled: bool, out: Path, size: Size) -> Path:
    """Sample and score once a base and seed; true and shuffled labels each get a copy with its own ranking."""
    raw = out / base / f"data-{seed}"
    make_data(base, raw, seed, size.groups)
    own = out / base / f"data-{seed}-{'shuffled' if shuffled else 'true'}"
    if not own.is_dir():
        part = own.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(raw, part)
        if shuffled:
            shuffle_scores(part, seed)
        rank(PreferenceDataset(part), [REWARD["name"]])
        part.rename(own)
    return own


def prepare_roles(base: str, seed: int, out: Path, size: Size) -> Path:
    """Rendered scenes of the training prompts, each beside an image of the base without guidance, as DDO wants it."""
    folder = out / base / f"data-{seed}-roles"
    real = real_images("testbed", "testbed:train", size.groups, seed)
    prompts = prompts_file([row for row, _ in real], folder / "prompts.jsonl")
    plan = {
        "model": load_config(RECIPES[base]).model.model_dump(), "prompts": str(prompts), "out": str(folder / "drawn"),
        "seed": seed, "images_per_prompt": 1, **sampling(base), "guidance_scale": 1.0,
    }  # fmt: skip
    sample(SampleConfig.model_validate(plan))
    write_real_against_generated(real, PreferenceDataset(folder / "drawn"), folder / "data")
    return folder / "data"


def diversity(images: Path) -> float:
    """Root mean square difference in [0, 1] of two images of one prompt, averaged over prompts and pairs."""
    by_prompt: dict[str, list[np.ndarray]] = {}
    for path in sorted(images.glob("*.png")):
        by_prompt.setdefault(path.stem.rsplit("-", 1)[0], []).append(np.asarray(Image.open(path), np.float32) / 255)
    values = [
        float(np.sqrt(((a - b) ** 2).mean()))
        for group in by_prompt.values()
        for i, a in enumerate(group)
        for b in group[i + 1 :]
    ]
    return statistics.fmean(values)


def run_cell(cell: Cell, out: Path, size: Size, prompts: str, overrides: list[str]) -> None:
    folder = cell.folder(out)
    if (folder / "cell.json").is_file():
        return
    method = METHODS[cell.method]
    steps = steps_of(method, size)
    recipe = RECIPES[cell.base].replace("dpo", method.recipe)
    if method.roles:
        data = prepare_roles(cell.base, cell.seed, out, size)
    else:
        data = prepare_data(cell.base, cell.seed, cell.shuffled, out, size)
    given = (f"run_dir={folder}", f"data.path={data}", f"seed={cell.seed}", f"train.steps={steps}")
    # One thread: with two, each waits for the other wherever something else holds a core.
    config = load_config(
        recipe, (*given, "train.threads=1", "tracking.trackers=[]", *method.settings(cell.base), *overrides)
    )
    cache(config)  # so that the time below is that of the steps
    started = time.process_time()
    train(config)
    spent = time.process_time() - started
    finish_cell(cell, folder, out, config.model.model_dump(), size, prompts, steps, spent)


def finish_cell(
    cell: Cell,
    folder: Path,
    out: Path,
    model: dict[str, Any],
    size: Size,
    prompts: str,
    steps: int,
    spent: float,
    more_rewards: tuple[str, ...] = (),
    **more: float,
) -> None:
    """Evaluate the weights in `folder` and write cell.json. spent: CPU-seconds of training; more: further facts.

    more_rewards: judged beside the GenEval reward, by their first column.
    """
    measures = (*MEASURES, *(f"{name}.{find_reward(name).columns[0]}" for name in more_rewards))
    other = out / "out_of_distribution.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in out_of_distribution(size.out_of_distribution)))
    scores: dict[str, dict[str, dict[str, list[list[float]]]]] = {}
    judged = [("held_out", prompts, size.prompts), ("out_of_distribution", str(other), None)]
    for kind, source, n in judged[: 2 if size.out_of_distribution else 1]:
        place = folder / kind
        plan = {
            "model": model, "weights": str(folder / "weights"), "prompts": source, "n": n,
            "seeds": size.seeds_per_prompt, "reward": REWARD, "more_rewards": [{"name": one} for one in more_rewards],
            "out": str(place),
        }  # fmt: skip
        evaluate(
            EvalConfig.model_validate({**plan, **sampling(cell.base)}), base_folder=out / cell.base / f"base-{kind}"
        )
        scores[kind] = {m: {c: load_scores(place, m, c).tolist() for c in measures} for m in ("base", "tuned")}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tail = rows[-max(1, len(rows) // 10) :]
    facts = {
        **asdict(cell),
        "steps": steps,
        "cpu_seconds_per_step": spent / steps,
        "drift": statistics.fmean(row["drift"] for row in tail) if "drift" in tail[0] else None,
        "diversity": diversity(folder / "held_out" / "eval" / "images" / "tuned"),
        "base_diversity": diversity(out / cell.base / "base-held_out"),
        "scores": scores,
        **more,
    }
    part = folder / "cell.part"
    part.write_text(json.dumps(facts))
    part.rename(folder / "cell.json")


def estimate(todo: list[Cell], size: Size) -> float:
    """CPU-hours of the cells that are left: a training pass counts three forwards, an image its steps twice."""
    total = 0.0
    for base in dict.fromkeys(cell.base for cell in todo):
        model = load_config(RECIPES[base]).model
        backbone = resolve.open_backbone(model, "cpu")
        conditioning = {k: v.repeat(16, *[1] * (v.dim() - 1)) for k, v in backbone.encode_prompts(["a circle"]).items()}
        side = backbone.default_resolution // backbone.vae_scale_factor
        x, t = torch.randn(16, backbone.latent_channels, side, side), torch.full((16,), 0.5 * backbone.process.span)
        times = []
        for _ in range(4):
            started = time.process_time()
            with torch.no_grad():
                backbone.predict(x, t, conditioning)
            times.append((time.process_time() - started) / 16)
        images = (size.prompts + size.out_of_distribution) * size.seeds_per_prompt
        own = [cell for cell in todo if cell.base == base]
        sampled = size.groups * 8 * len({cell.seed for cell in own}) + images * (len(own) + 1)
        total += min(times[1:]) * (3 * size.budget * len(own) + 2 * SAMPLING["steps"] * sampled)
    return total / 3600


def summarise(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a base, method and kind of labels, over the seeds."""
    rows = []
    for key in dict.fromkeys((c["base"], c["method"], c["shuffled"]) for c in done):
        own = [c for c in done if (c["base"], c["method"], c["shuffled"]) == key]
        row: dict[str, Any] = {"base": key[0], "method": key[1], "shuffled": key[2], "seeds": len(own)}
        for kind in own[0]["scores"]:
            for column in own[0]["scores"][kind]["base"]:
                sides = [pool([np.array(c["scores"][kind][m][column], float) for c in own]) for m in ("base", "tuned")]
                row[f"{kind} {column}"] = asdict(compare(sides[0], sides[1]))
        twins = [c for c in done if (c["base"], c["method"], c["shuffled"]) == (*key[:2], True)]
        if not key[2] and twins and {c["seed"] for c in twins} == {c["seed"] for c in own}:
            sides = [
                pool([np.array(c["scores"]["held_out"]["tuned"][MEASURES[0]], float) for c in group])
                for group in (twins, own)
            ]
            row["against shuffled"] = asdict(compare(sides[0], sides[1]))
        for name in ("steps", "cpu_seconds_per_step", "diversity", "base_diversity"):
            row[name] = statistics.fmean(c[name] for c in own)
        drifts = [c["drift"] for c in own if c["drift"] is not None]
        row["drift"] = statistics.fmean(drifts) if drifts else None
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=["shapes-sdxl", "shapes-sd3"], choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-objectives"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--prompts", default="testbed:test", help="testbed:validation is for choosing settings")
    parser.add_argument("--max-hours", type=float, default=8.0)
    parser.add_argument("--methods", nargs="+", default=[""], help="only methods whose names begin so")
    parser.add_argument("--tiny", action="store_true", help="a few groups, steps and prompts: does everything run?")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values of every training config")
    given = parser.parse_intermixed_args()
    out = given.out / given.prompts.replace(":", "-")
    out.mkdir(parents=True, exist_ok=True)
    final = given.prompts == "testbed:test"
    size = TINY if given.tiny else Size() if final else CHOOSING
    wanted = cells(given.bases, given.seeds, given.methods, controls=final)
    todo = [cell for cell in wanted if not (cell.folder(out) / "cell.json").is_file()]
    if todo:
        hours = estimate(todo, size)
        print(f"{len(todo)} of {len(wanted)} cells to run, about {hours:.2f} CPU-hours", flush=True)
        if hours > given.max_hours:
            sys.exit(f"more than --max-hours={given.max_hours:g}; choose fewer bases or seeds")
    for cell in todo:
        print(f"\n=== {cell.base}: {cell.method}, {'shuffled' if cell.shuffled else 'true'} labels, seed {cell.seed}")
        run_cell(cell, out, size, given.prompts, given.overrides)
    done = [json.loads((cell.folder(out) / "cell.json").read_text()) for cell in wanted]
    rows = summarise(done)
    if final:
        write_report(rows, given.results, {**asdict(size), "overrides": given.overrides})
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
