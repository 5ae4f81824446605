"""A training run on the toy backbone as a program, so that tests can kill it or start it several times at once.

python toy_run.py RUN_DIR STEPS GROUPS_PER_STEP MICRO_BATCH SECONDS_PER_STEP [EVERY [SECTIONS]]

With EVERY above 0, a validation each so many steps: its score is read off the policy's weights, which no reward needs images
for. SECTIONS: further sections of the config, as JSON.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from diffalign.cli.errors import plain_errors
from diffalign.training.validation import Validation
from helpers import toy


@dataclass(frozen=True)
class Weighed(Validation):
    """Falls and rises with the weights, so the best one is neither the first nor the last."""

    def run(self, run_dir: Path, done: int) -> dict[str, Any]:
        size = float(self.backbone.trainable()["up"].detach().abs().mean())
        return {"step": done, "scores": {"weights.size": [round(-((size - 0.02) ** 2), 6), 0.0]}}


if __name__ == "__main__":
    run_dir, steps, groups, micro = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    settings = {"steps": steps, "groups_per_step": groups, "micro_batch": micro, "threads": 1}
    sections: dict[str, Any] = {"train": settings, "checkpoint": {"every": 3}}
    options: dict[str, Any] = {}
    if len(sys.argv) > 6 and int(sys.argv[6]):
        sections["validation"] = {"every": int(sys.argv[6]), "prompts": "p.txt"}
    for name, values in json.loads(sys.argv[7]).items() if len(sys.argv) > 7 else ():
        sections[name] = {**sections.get(name, {}), **values}
    config, backbone = toy.toy_config(run_dir, **sections), toy.ToyBackbone()
    if config.validation.every:
        options["validation"] = Weighed(backbone, config.validation, [], {}, {}, 8)
    try:
        with plain_errors(resumes=True):
            toy.train(config, backbone=backbone, source=toy.SlowSource(toy.ToySource(), float(sys.argv[5])), **options)
    except typer.Exit as left:
        sys.exit(left.exit_code)
