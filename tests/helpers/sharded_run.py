"""Full fine-tuning of a tiny SD3 as a program, to be started alone or as two processes.

python sharded_run.py MODEL RUN_DIR SHARD STEPS...

Trains to each of STEPS in turn, each time from a model loaded anew, so that the later ones resume.
"""

import sys
from pathlib import Path

from diffalign.pipelines import load_backbone
from helpers import toy
from helpers.tiny_training import Source, config_for

if __name__ == "__main__":
    model, run_dir, shard, *steps = sys.argv[1:]
    for goal in map(int, steps):
        backbone = load_backbone(model)
        config = config_for(Path(model), Path(run_dir), goal, optimizer={"lr": 1e-3})
        tuned = {"tune": config.tune.model_copy(update={"kind": "full"})}
        trained = {"train": config.train.model_copy(update={"shard": shard, "micro_batch": 1, "ema_decay": 0.5})}
        toy.train(config.model_copy(update={**tuned, **trained}), backbone=backbone, source=Source(backbone))
