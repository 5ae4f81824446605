"""Does the quickstart gain with every seed, and does it gain nothing from shuffled labels?

python benchmarks/quickstart_seeds.py [--base shapes-sdxl] [--seeds 0 1 2] [--out runs/bench-quickstart] [KEY=VALUE ...]

Each seed runs twice on the same images, with true and with shuffled labels. The measure was fixed before any training: the
dense GenEval score on 256 held-out prompts x 4 seeds; intervals are bootstrapped over prompts. Rounds that are complete are
kept, so the same command resumes.
"""

import argparse
import json
import platform
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np

from diffalign.evaluation.compare import Comparison, compare, pool
from diffalign.evaluation.evaluate import load_scores
from diffalign.stages.quickstart import make_data, quickstart

MEASURE = "geneval.dense"
RESULTS = Path(__file__).parent / "results"


def scores(run: Path) -> dict[str, np.ndarray]:
    return {model: load_scores(run, model, MEASURE) for model in ("base", "tuned")}


def one_seed(base: str, seed: int, out: Path, prompts: str, overrides: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """True and shuffled labels over the same images; only the labels differ."""
    data = out / f"data-{seed}"
    make_data(base, data, seed)
    found = {}
    for labels in ("true", "shuffled"):
        folder = out / f"{labels}-{seed}"
        own = folder / "data"
        if not own.is_dir():  # ranking writes into the dataset, so each has its own copy
            shutil.copytree(data, own.with_suffix(".part"), dirs_exist_ok=True)
            own.with_suffix(".part").rename(own)
        quickstart(
            base,
            folder,
            seed,
            shuffle=labels == "shuffled",
            prompts=prompts,
            data=own,
            base_images=out / "base",
            overrides=tuple(overrides),
        )
        found[labels] = scores(folder / "run")
    return found


def line(name: str, c: Comparison) -> str:
    return (
        f"| {name} | {c.base:.3f} | {c.tuned:.3f} | {c.difference:+.3f} | {c.interval.words()} "
        f"| {100 * c.win_rate:.1f} % |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="shapes-sdxl", choices=("shapes-sd3", "shapes-sdxl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-quickstart"))
    parser.add_argument("--prompts", default="testbed:test", help="testbed:validation is for choosing settings")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values of the training config")
    given = parser.parse_intermixed_args()
    out = given.out / given.base
    runs = {seed: one_seed(given.base, seed, out, given.prompts, given.overrides) for seed in given.seeds}

    rows: dict[str, Comparison] = {}
    pooled = {}
    for labels in ("true", "shuffled"):
        for seed, found in runs.items():
            rows[f"{labels} labels, seed {seed}"] = compare(found[labels]["base"], found[labels]["tuned"])
        pooled[labels] = {m: pool([found[labels][m] for found in runs.values()]) for m in ("base", "tuned")}
        rows[f"{labels} labels, all seeds"] = compare(pooled[labels]["base"], pooled[labels]["tuned"])
    rows["true against shuffled"] = compare(pooled["shuffled"]["tuned"], pooled["true"]["tuned"])

    print(f"\n{given.base}, {MEASURE}, {given.prompts}\n")
    print("| | base | tuned | difference | 95 % interval | win rate |\n|---|---|---|---|---|---|")
    print("\n".join(line(name, c) for name, c in rows.items()))
    if given.prompts == "testbed:test":
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"quickstart-{given.base}.json"
        document = {
            "measure": MEASURE,
            "machine": platform.processor() or platform.machine(),
            "overrides": given.overrides,
        }
        path.write_text(json.dumps({**document, "rows": {k: asdict(c) for k, c in rows.items()}}, indent=1) + "\n")
        print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
