"""The embedded world from prompts to a judged model: drawn by two models, scored, ranked, trained on, evaluated.

Used by `synthetic_data.py world`. Every stage keeps what is done, so the same command resumes; the time of a
stage is written down when it ends. One thread, so that CPU seconds are what the work costs.
"""

import json
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from diffalign.config import EvalConfig, load_config, load_synth_config
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.rank import generator_warning
from diffalign.evaluation.compare import compare
from diffalign.evaluation.evaluate import load_scores
from diffalign.intervals import interval_in
from diffalign.stages.evaluate import evaluate
from diffalign.stages.quickstart import REWARD, sampling
from diffalign.stages.rank import rank_dataset
from diffalign.stages.synth import synth
from diffalign.stages.train import train

MEASURE = "geneval.dense"
BASE = "shapes-sdxl"


class Clock:
    """Seconds of each stage, kept in a file; of a stage that was interrupted only its last stretch is known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}

    def run(self, name: str, action: Callable[[], Any]) -> None:
        """Do a stage unless it is done. Its second start is marked: the times are then too small."""
        entry = self.known.get(name, {})
        if "cpu_s" in entry:
            return
        self.known[name] = {"resumed": bool(entry)}
        self._write()
        cpu, clock = time.process_time(), time.perf_counter()
        action()
        spent = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - clock}
        self.known[name] |= {key: round(value, 1) for key, value in spent.items()}
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.known, indent=1) + "\n")


def world(out: Path, prompts: int, steps: int | None, test_prompts: int, seeds: int) -> dict[str, Any]:
    """One synthetic dataset, a training run on it and its control with shuffled labels; what came out, as plain values."""
    clock = Clock(out / "clock.json")
    data = out / "data"
    given = [f"out={data}", f"prompts.n={prompts}"]
    config = load_synth_config("synth_shapes", given)
    clock.run("draw", lambda: synth(load_synth_config("synth_shapes", [*given, "rewards=[]", "contact_sheet=0"])))
    clock.run("score and rank", lambda: synth(config))
    shuffled = out / "shuffled"
    clock.run("shuffle", lambda: _shuffled(data, shuffled, config))
    for name, folder in (("true", data), ("shuffled", shuffled)):
        base = None if name == "true" else out / "true"
        clock.run(f"train {name}", partial(_train, out / name, folder, steps))
        clock.run(f"evaluate {name}", partial(_evaluate, out / name, test_prompts, seeds, base))
    return _outcome(out, clock.known, steps, config.rank.sources or [])


def _shuffled(data: Path, copy: Path, config: Any) -> None:
    """The same images and scores, each group's preferences permuted."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(data, copy)
    rank_dataset(PreferenceDataset(copy), config.rank, [reward.name for reward in config.rewards], shuffle=True)


def _train(run: Path, data: Path, steps: int | None) -> None:
    given = [f"run_dir={run}", f"data.path={data}", "train.threads=1", "tracking.trackers=[]"]
    train(load_config("shapes_sdxl_dpo", [*given, *([f"train.steps={steps}"] if steps else [])]))


def _evaluate(run: Path, prompts: int, seeds: int, base: Path | None) -> None:
    """As `diffalign testbed quickstart` does; the base model's images are drawn once."""
    evaluation = {
        "model": load_config("shapes_sdxl_dpo", []).model.model_dump(),
        "weights": str(run / "weights"),
        "prompts": "testbed:test",
        "n": prompts,
        "seeds": seeds,
        "reward": REWARD,
        "out": str(run),
    }
    evaluate(EvalConfig.model_validate({**evaluation, **sampling(BASE)}), base_folder=base)


def _outcome(out: Path, clock: dict[str, Any], steps: int | None, voters: list[str]) -> dict[str, Any]:
    dataset = PreferenceDataset(out / "data")
    ranking = json.loads((dataset.folder / "ranking.json").read_text())["report"]
    images, drawing = len(dataset.image_index), clock["draw"]
    alone = not drawing["resumed"] and drawing["cpu_s"] > 0  # else others drew, or an earlier start did
    size = sum(path.stat().st_size for path in (dataset.folder / "images").iterdir())
    dense, generators = dataset.score_array(MEASURE), dataset.image_column("generator")
    scores = {
        name: {m: load_scores(out / name, m, MEASURE) for m in ("base", "tuned")} for name in ("true", "shuffled")
    }
    rows = {f"{name} labels": asdict(compare(found["base"], found["tuned"])) for name, found in scores.items()}
    rows["true against shuffled"] = asdict(compare(scores["shuffled"]["tuned"], scores["true"]["tuned"]))
    return {
        "machine": platform.processor() or platform.machine(),
        "prompts": len(dataset),
        "images": images,
        "training_steps": steps or load_config("shapes_sdxl_dpo", []).train.steps,
        "voters": voters,
        "stages": clock,
        "images_per_cpu_s": round(images / drawing["cpu_s"], 2) if alone else None,
        "image_kB": round(size / images / 1000, 2),
        "without_preference": ranking["without_preference"],
        "generator_explains": round(ranking["generator_explains"], 3),
        "warned": generator_warning(ranking["generator_explains"]),
        "dense_by_generator": {
            name: round(float(dense[generators == name].mean()), 3) for name in sorted(set(generators))
        },
        "measure": MEASURE,
        "rows": rows,
    }


def show(found: dict[str, Any]) -> None:
    """The tables of docs/synth.md."""
    print("\n| stage | CPU s |\n|---|---|")
    for name, entry in found["stages"].items():
        print(f"| {name} | {entry['cpu_s']:.0f}{' (its last stretch)' if entry['resumed'] else ''} |")
    print(f"\n{found['images']} images, {found['images_per_cpu_s']} a CPU second, {found['image_kB']} kB each")
    print(f"dense by generator: {found['dense_by_generator']}; generators explain {found['generator_explains']:.0%}")
    print(f"\n| {found['measure']} | base | tuned | difference | 95 % interval |\n|---|---|---|---|---|")
    for name, c in found["rows"].items():
        print(f"| {name} | {c['base']:.3f} | {c['tuned']:.3f} | {c['difference']:+.3f} | {interval_in(c).words()} |")
