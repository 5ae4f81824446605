"""A training run on the toy backbone as a program, so that tests can kill it or start it several times at once.

python toy_run.py RUN_DIR STEPS GROUPS_PER_STEP MICRO_BATCH SECONDS_PER_STEP
"""

import sys
import time
from pathlib import Path

import toy

from diffalign.training.loop import train


class SlowSource(toy.ToySource):
    """Takes its time, so that a kill finds the run at work."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def batch(self, indices: list[int]) -> toy.Batch:
        time.sleep(self.seconds)
        return super().batch(indices)


if __name__ == "__main__":
    run_dir, steps, groups, micro = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    settings = {"steps": steps, "groups_per_step": groups, "micro_batch": micro, "threads": 1}
    config = toy.toy_config(run_dir, train=settings, checkpoint={"every": 3})
    train(config, backbone=toy.ToyBackbone(), source=SlowSource(float(sys.argv[5])))
