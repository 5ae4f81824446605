"""A small judge to train: records of the embedded world, an untrained model and a config."""

from __future__ import annotations

from pathlib import Path

from diffalign.stages.judge import judge_data
from diffalign.testbed.judge_base import untrained_judge


def make_judge_run(folder: Path, groups: int, steps: int, every: int) -> Path:
    """Write records/, base/ and judge.yaml into a folder and return the config; every: steps between checkpoints."""
    judge_data(folder / "records", "train", groups, 3, 2, seed=0)
    untrained_judge("student", 0).save(folder / "base")
    config = folder / "judge.yaml"
    config.write_text(
        f"role: teacher\nmethod: sft\ndevice: cpu\nrun_dir: {folder / 'run'}\nmodel: {{path: {folder / 'base'}}}\n"
        f"data: {{pairs: {folder / 'records/pairs.jsonl'}}}\ncheckpoint: {{every: {every}}}\ntracking: {{trackers: []}}\n"
        f"train: {{steps: {steps}, records_per_step: 2, micro_batch: 2, threads: 1}}\n"
    )
    return config
