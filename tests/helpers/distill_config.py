"""A config of `diffalign distill` for a tiny model and four prompts."""

from __future__ import annotations

from pathlib import Path

PROMPTS = "a red cube\ntwo dogs\na cat left of a cup\nsnow\n"


def config(folder: Path, model: Path, more: str = "") -> Path:
    (folder / "prompts.txt").write_text(PROMPTS)
    path = folder / "c.yaml"
    path.write_text(
        f"run_dir: {folder / 'run'}\ndevice: cpu\nmodel: {{path: {model}}}\nprompts: {folder / 'prompts.txt'}\n"
        "tune: {rank: 2, alpha: 2.0}\nmatch: {guidance: 3.0}\nfake: {updates: 2}\ntracking: {trackers: []}\n"
        "train: {steps: 2, groups_per_step: 2, threads: 1}\ncheckpoint: {every: 1}\noptimizer: {lr: 0.01}\n" + more
    )
    return path
