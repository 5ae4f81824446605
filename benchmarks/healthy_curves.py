"""Do the health findings leave ten good runs alone, and do they name eight broken ones?

python benchmarks/healthy_curves.py [--out runs/healthy] [--only NAME ...] [--again]

On the embedded world. Every run is 200 steps of a shipped recipe on 256 groups of 8 images (about two minutes on one core,
its validations included); a broken one changes a single thing of a good one. Health is a function of the logged rows, so
--again examines the rows that are there without training. What is complete is kept, so the same command resumes.

Then the weights that validation chose are drawn against the last ones of the three DPO runs, on prompts that chose nothing.
Writes benchmarks/results/healthy-curves.json, docs/images/healthy-curves.svg and prints the tables of docs/healthy-curves.md.
"""

import argparse
import gzip
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffalign.config import EvalConfig, load_config
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.labels import labelled_groups
from diffalign.data.rank import rank
from diffalign.data.training_source import choose_groups
from diffalign.data.writer import write_groups
from diffalign.errors import DiffalignError
from diffalign.evaluation.compare import Comparison, compare, pool
from diffalign.evaluation.evaluate import load_scores
from diffalign.files import read_json_lines
from diffalign.health import Finding, examine, examine_labels
from diffalign.stages import resolve
from diffalign.stages.evaluate import evaluate as evaluate_stage
from diffalign.stages.quickstart import RECIPES, REWARD, make_data, sampling
from diffalign.stages.train import train as train_stage
from shared.healthy_curves_picture import picture

RESULTS = Path(__file__).parent / "results"
STEPS, HALF, QUARTER, MEASURE = 200, 100, 50, "geneval.dense"
SDXL, SD3 = "shapes-sdxl", "shapes-sd3"
VALIDATED = ("validation.every=50", "validation.prompts=testbed:validation", "validation.n=64", "validation.seeds=2")
SHARED = ("noise=shared", "inversion={}")
SFT = ("objective={name: sft}",)
# What these recipes had when the committed rows were made.
RANK = ("objective.beta=50.0", "optimizer.lr=0.001")


@dataclass(frozen=True)
class Kind:
    """A run: `recipe` is the method's shipped recipe of the base; `called` what a broken one must be named as."""

    base: str
    recipe: str
    seed: int
    changes: tuple[str, ...] = ()
    steps: int = STEPS
    labels: str = "true"
    called: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        return not self.called


DIVERGED = ("loss_diverges", "winner_rises", "loser_dominates", "drift_explodes", "gradient_jumps")
RUNS: dict[str, Kind] = {
    "dpo-sdxl-0": Kind(SDXL, "dpo", 0, VALIDATED),
    "dpo-sdxl-1": Kind(SDXL, "dpo", 1, VALIDATED),
    "dpo-sdxl-2": Kind(SDXL, "dpo", 2, VALIDATED),
    "dpo-sd3-0": Kind(SD3, "dpo", 0),
    "dpo-sd3-1": Kind(SD3, "dpo", 1),
    "dpo-sd3-2": Kind(SD3, "dpo", 2),
    "rankdpo-sdxl-0": Kind(SDXL, "rankdpo", 0, RANK),
    "smpo-sdxl-1": Kind(SDXL, "smpo", 1, (*SHARED, *RANK)),
    # Six images a group: as many forward passes as DPO in 300 steps.
    "gdro-sdxl-2": Kind(SDXL, "gdro", 2, ("objective.beta=20.0", "optimizer.lr=0.001"), steps=HALF),
    "sft-sdxl-0": Kind(SDXL, "dpo", 0, SFT),
    "beta-small-sdxl": Kind(SDXL, "dpo", 0, ("objective.beta=1.0",), HALF, called=("beta_too_small",)),
    "reversed-sdxl": Kind(SDXL, "dpo", 0, VALIDATED, HALF, labels="reversed", called=("labels_oppose_scores",)),
    "shuffled-sdxl": Kind(SDXL, "dpo", 0, labels="shuffled", called=("labels_ignore_scores",)),
    "lr-high-sdxl": Kind(SDXL, "dpo", 0, ("optimizer.lr=0.03",), HALF, called=DIVERGED),
    # The first quarter alone: that is where they must be named.
    "beta-small-sd3": Kind(SD3, "dpo", 1, ("objective.beta=0.1",), QUARTER, called=("beta_too_small",)),
    "lr-high-sd3": Kind(SD3, "dpo", 1, ("optimizer.lr=0.03",), QUARTER, called=DIVERGED),
    "lr-high-rankdpo-sdxl": Kind(
        SDXL, "rankdpo", 0, ("objective.beta=50.0", "optimizer.lr=0.03"), QUARTER, called=DIVERGED
    ),
    "lr-high-sft-sdxl": Kind(SDXL, "dpo", 0, (*SFT, "optimizer.lr=0.03"), QUARTER, called=DIVERGED),
}
CHOSEN = ("dpo-sdxl-0", "dpo-sdxl-1", "dpo-sdxl-2")


# ---- Data and runs ---------------------------------------------------------------------------------------------------


def prepare_data(out: Path, base: str, seed: int, labels: str) -> Path:
    """Images and scores once a base and seed; each kind of labels has its own ranking of them."""
    raw = out / base / f"data-{seed}"
    own = out / base / f"data-{seed}-{labels}"
    if own.is_dir():
        return own
    if not (raw / "scores" / f"{REWARD['name']}.parquet").is_file():
        make_data(base, raw, seed)
    part = own.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(raw, part)
    rank(PreferenceDataset(part), ["geneval"], shuffle_seed=seed if labels == "shuffled" else None)
    if labels == "reversed":
        dataset = PreferenceDataset(part)
        rows = [dataset.group(i) for i in range(len(dataset))]
        write_groups(part, [{**row, "preference": [1 - p for p in row["preference"]]} for row in rows])
    part.rename(own)
    return own


def train(out: Path, name: str) -> None:
    kind, folder = RUNS[name], out / "runs" / name
    if (folder / "weights").exists() or (folder / "ended.txt").exists():
        return
    data = prepare_data(out, kind.base, kind.seed, kind.labels)
    draws = [f"validation.{key}={sampling(kind.base)[key]}" for key in ("steps", "guidance_scale", "batch_size")]
    given = [
        f"data.path={data}",
        f"run_dir={folder}",
        f"seed={kind.seed}",
        f"train.steps={kind.steps}",
        "train.threads=1",
    ]
    recipe = RECIPES[kind.base].replace("dpo", kind.recipe)
    config = load_config(recipe, [*given, "tracking.trackers=[]", *draws, *kind.changes])
    try:
        train_stage(config)
    except DiffalignError as error:  # a broken run may well end early; that is a result
        (folder / "ended.txt").write_text(f"{error}\n")


# ---- Health ----------------------------------------------------------------------------------------------------------


def labels_of(out: Path, kind: Kind) -> list[Finding]:
    """What is said of the labels before the first step, as training does it."""
    config = load_config(RECIPES[kind.base].replace("dpo", kind.recipe), ())
    dataset = PreferenceDataset(prepare_data(out, kind.base, kind.seed, kind.labels))
    chosen = choose_groups(config.data, dataset)[0]
    values = [np.array(dataset.group(i)["preference"]) for i in chosen]
    return examine_labels(labelled_groups(dataset, chosen, values))


def judge(out: Path, name: str) -> dict[str, Any]:
    """Findings of a run's rows, and whether they are as they must be: none, or the right one in the first quarter."""
    kind, folder = RUNS[name], out / "runs" / name
    rows, validations = read_json_lines(folder / "metrics.jsonl"), read_json_lines(folder / "validation.jsonl")
    found = examine(rows, validations, labels_of(out, kind))
    alarms = [f for f in found if f.words.level == "alarm"]
    first = min((f.step for f in alarms if f.name in kind.called), default=None)
    kept = {row["step"]: float(np.mean(row["scores"][MEASURE])) for row in validations}
    return {
        "kind": {**asdict(kind), "good": kind.good},
        "steps": len(rows),
        "findings": [{"name": f.name, "level": f.words.level, "step": f.step, "measured": f.measured} for f in found],
        "as_expected": not alarms if kind.good else first is not None and first <= QUARTER,
        "validation": kept,
    }


# ---- The best against the last ---------------------------------------------------------------------------------------


def best_against_last(out: Path, name: str) -> dict[str, np.ndarray]:
    """Scores of the test prompts, [256, 2], drawn by the untrained model, by best/ and by weights/."""
    kind, run, place = RUNS[name], out / "runs" / name, out / "evaluated" / name
    same = resolve.weights_digest(run / "best") == resolve.weights_digest(
        run / "weights"
    )  # then one set of images is both
    if not (place / "eval.json").is_file():
        plan = {
            "model": load_config(run / "config.yaml").model.model_dump(), "weights": str(run / "weights"),
            "others": {} if same else {"best": str(run / "best")}, "prompts": "testbed:test", "n": 256, "seeds": 2,
            "reward": REWARD, "out": str(place),
        }  # fmt: skip
        config = EvalConfig.model_validate({**plan, **sampling(kind.base)})
        evaluate_stage(config, base_folder=out / "evaluated" / f"base-{kind.base}")
    models = {"base": "base", "tuned": "tuned", "best": "tuned" if same else "best"}
    return {model: load_scores(place, drawn, MEASURE) for model, drawn in models.items()}


def comparisons(out: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Base to last, base to best, and last to best, of each run and of all together."""
    scores = {name: best_against_last(out, name) for name in names}
    scores["all"] = {m: pool([s[m] for s in scores.values()]) for m in ("base", "tuned", "best")}
    rows: dict[str, dict[str, Any]] = {}
    for name, found in scores.items():
        for label, one, other in (
            ("last", "base", "tuned"),
            ("best", "base", "best"),
            ("best - last", "tuned", "best"),
        ):
            rows[f"{name}: {label}"] = asdict(compare(found[one], found[other]))
    return rows


# ---- Tables ----------------------------------------------------------------------------------------------------------


def table(judged: dict[str, dict[str, Any]]) -> str:
    lines = ["| run | what the health lines say, each from its first step | validation reward |", "|---|---|---|"]
    for name, run in judged.items():
        found = [f"`{f['name']}` ({f['step']}: {f['measured']})" for f in run["findings"]]
        scores = ", ".join(f"{v:.3f}" for v in run["validation"].values())
        lines.append(f"| {name} | {'; '.join(found) or 'nothing'} | {scores} |")
    return "\n".join(lines)


def chosen_table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| | from | to | difference | 95 % interval |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        c = Comparison(**row)
        lines.append(f"| {name} | {c.base:.3f} | {c.tuned:.3f} | {c.difference:+.3f} | {c.interval.words()} |")
    return "\n".join(lines)


def keep_rows(out: Path, names: list[str], path: Path) -> None:
    """All rows in one compressed file, so that health can be examined again wherever the repository is."""
    runs = {
        name: {part: read_json_lines(out / "runs" / name / f"{part}.jsonl") for part in ("metrics", "validation")}
        for name in names
    }
    path.write_bytes(gzip.compress(json.dumps(runs).encode(), mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/healthy"))
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--again", action="store_true", help="train nothing: examine the rows that are there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in [] if given.again else given.only:
        train(given.out, name)
    there = [name for name in given.only if (given.out / "runs" / name / "metrics.jsonl").is_file()]
    judged = {name: judge(given.out, name) for name in there}
    print(table(judged))
    for name, run in judged.items():
        if not run["as_expected"]:
            print(f"NOT AS EXPECTED: {name}")
    if set(there) < set(RUNS):
        print("some runs are missing: results, picture and comparison are left as they are")
        return
    compared = comparisons(given.out, list(CHOSEN))
    print(f"\n{chosen_table(compared)}")
    document = {"steps": STEPS, "runs": judged, "best_against_last": compared}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "healthy-curves.json").write_text(json.dumps(document, indent=1) + "\n")
    keep_rows(given.out, there, RESULTS / "healthy-curves-rows.json.gz")
    drawing = Path(__file__).parent.parent / "docs" / "images" / "healthy-curves.svg"
    drawing.write_text(picture({name: read_json_lines(given.out / "runs" / name / "metrics.jsonl") for name in there}))


if __name__ == "__main__":
    main()
