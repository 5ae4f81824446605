"""What a dry run of `diffalign train` says of the model and of the memory that a step takes."""

import os

from diffalign.config import TrainConfig
from diffalign.pipelines import Backbone
from diffalign.stages.checks import check_packages
from diffalign.stages.dry_run import model_facts, print_facts, print_where
from diffalign.stages.micro_batch import gpu_room, planned_conditioning, usual_micro_batch
from diffalign.training.memory import MemoryPrediction, described, fitting_checkpointing, fitting_micro_batch


def describe_training(
    config: TrainConfig, backbone: Backbone | None, members: int, device: str, judges: dict[str, str]
) -> None:
    """Print facts about the model, its memory, the rewards, and where the model is. Uses the backbone up.

    backbone: that of `planned_backbone`; members: images of a group; judges: rewards in words.
    """
    model = model_facts(backbone, config.model)
    if backbone is None:
        print_facts("model", model)
    else:
        conditioning = planned_conditioning(config, backbone)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        prediction = MemoryPrediction(config, backbone, conditioning, cuda=device != "cpu", processes=processes)
        print_facts("model", model | {"trainable": f"{prediction.trainable:,}"})
        each = max(1, config.train.groups_per_step // processes)
        micro_batch = min(config.train.micro_batch or usual_micro_batch(each), each)
        memory: dict[str, str] = {}
        if config.model.gradient_checkpointing == "auto":
            if device != "cpu":
                fitting_checkpointing(prediction, micro_batch, members, gpu_room())
            else:
                prediction.backbone.checkpoint(True)
            memory["gradient_checkpointing"] = f"auto, predicted as {str(prediction.backbone.checkpointing).lower()}"
        memory |= described(prediction, micro_batch, members)
        if device != "cpu":
            fitting = fitting_micro_batch(prediction, members, gpu_room())
            memory["this GPU holds"] = f"train.micro_batch={fitting}" + (
                "" if config.train.micro_batch else ", as auto takes"
            )
        print_facts("memory of a process, predicted", memory)
    print_facts("rewards of the validation" if config.train.online is None else "rewards", judges)
    print_where(config.model, model)
    check_packages(config)
