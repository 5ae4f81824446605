"""Do three rounds of GDRO on new images gain more than one run of the same length on fixed data?

python benchmarks/rounds.py [--seeds 0 1 2] [--out runs/bench-rounds] [--tiny]

On the embedded world's flow model. Both see the same training prompts, as many images in all, and as many steps: the rounds
draw eight images a prompt from the last round's model, three times; the one run draws 24 from the base. Both run for a fixed
number of steps. The measure was fixed before any training: the dense GenEval score on held-out prompts and on prompts of
kinds that no training caption has; intervals are bootstrapped over prompts. Whatever is complete is kept, so the same command
resumes.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.config import EvalConfig, RoundsConfig, load_config, load_rounds_config
from diffalign.evaluation.compare import compare, pool
from diffalign.evaluation.evaluate import load_scores
from diffalign.intervals import interval_in
from diffalign.stages.evaluate import evaluate
from diffalign.stages.rounds import round_folder, rounds
from diffalign.testbed.shape_prompts import draw_prompts
from shared.unseen_prompts import out_of_distribution

MEASURE = "geneval.dense"
ROUNDS = 3
RESULT = Path(__file__).parent / "results" / "rounds.json"


def plan(name: str, seed: int, out: Path, tiny: bool) -> RoundsConfig:
    """The rounds, or the one run, of a seed."""
    count, images = (ROUNDS, 8) if name == "rounds" else (1, 8 * ROUNDS)
    steps, groups, held_out = (2, 4, 4) if tiny else (130, 128, 128)
    source = out / f"train-{seed}.jsonl"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps(row) + "\n" for row in draw_prompts("train", groups, seed)))
    # One thread: with two, each waits for the other wherever something else holds a core.
    training = [f"train.steps={steps * ROUNDS // count}", "train.threads=1", "tracking.trackers=[]"]
    given = {
        "out": str(out / f"{name}-{seed}"), "rounds": count, "seed": 10 * seed, "patience": None, "overrides": training,
        "data.prompts": str(source), "data.n": None, "data.images_per_prompt": images, "evaluate.n": held_out,
    }  # fmt: skip
    return load_rounds_config("rounds_shapes_gdro", [f"{key}={json.dumps(value)}" for key, value in given.items()])


def judge(config: RoundsConfig, out: Path, tiny: bool) -> dict[str, dict[str, np.ndarray]]:
    """Scores [prompts, seeds] of base and tuned model, on held-out prompts and on those of other kinds."""
    other = out / "out_of_distribution.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in out_of_distribution(6 if tiny else 96)))
    run = round_folder(config.out, config.rounds) / "run"
    model = load_config(run / "config.yaml").model.model_dump()
    found = {}
    for kind, source, n in (("held_out", "testbed:test", 6 if tiny else 256), ("other_kinds", str(other), None)):
        wanted: dict[str, Any] = {"model": model, "device": "cpu", "weights": str(run / "weights"), "prompts": source}
        wanted |= {"n": n, "seeds": 1 if tiny else 4, "reward": config.evaluate.reward.model_dump()}
        wanted |= {"out": str(config.out / kind), **config.images.model_dump()}
        evaluate(EvalConfig.model_validate(wanted), base_folder=out / f"base-{kind}")
        found[kind] = {name: load_scores(config.out / kind, name, MEASURE) for name in ("base", "tuned")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-rounds"))
    parser.add_argument("--tiny", action="store_true", help="a trial of the machinery; writes no result")
    given = parser.parse_args()
    scores: dict[str, list[dict[str, dict[str, np.ndarray]]]] = {"rounds": [], "fixed": []}
    for seed in given.seeds:
        for name, found in scores.items():
            config = plan(name, seed, given.out, given.tiny)
            rounds(config)
            found.append(judge(config, given.out, given.tiny))
    result: dict[str, Any] = {"seeds": given.seeds, "measure": MEASURE}
    for kind in ("held_out", "other_kinds"):
        pooled = {name: pool([one[kind]["tuned"] for one in found]) for name, found in scores.items()}
        base = pool([one[kind]["base"] for one in scores["fixed"]])
        pairs = {name: (base, pooled[name]) for name in pooled} | {
            "rounds against fixed": (pooled["fixed"], pooled["rounds"])
        }
        result[kind] = {name: asdict(compare(*pair)) for name, pair in pairs.items()}
        for name, found in result[kind].items():
            print(f"{kind}, {name}: {found['difference']:+.3f} ({interval_in(found).words()})")
    if not given.tiny:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        print(RESULT)


if __name__ == "__main__":
    main()
