"""`train.micro_batch: auto`, as many groups in a forward pass as the GPU is predicted to hold, and
`model.gradient_checkpointing: auto`, none where it holds a step without."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from diffalign.config import TrainConfig, load_run_config
from diffalign.config.run import AUTO, divisors
from diffalign.data.schema import CONDITIONS
from diffalign.pipelines import Backbone
from diffalign.pipelines.checkpointing import Checkpointing
from diffalign.pipelines.known_models import empty_conditioning
from diffalign.progress import say
from diffalign.stages.resolve import note_other_base, open_backbone, planned_backbone
from diffalign.training.memory import MemoryPrediction, fitting_checkpointing, fitting_micro_batch

SHARE, CONTEXT = 0.92, 2**30
"""What of a GPU's memory a step may take, beside a CUDA context: predictions are within 7%."""
USUAL = 8


def gpu_room() -> int:
    """Return the bytes that a step may take on this process's GPU; of its size, so that it is the same in every run."""
    return int(SHARE * torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory) - CONTEXT


def usual_micro_batch(each: int) -> int:
    """Return the micro-batch where there is no GPU to fill: the largest divisor of a process's groups up to 8."""
    return divisors(each, USUAL)[0]


def kept_micro_batch(config: TrainConfig) -> TrainConfig:
    """Return the config with the number that the run's config.yaml has in the place of `auto`, where the run has begun.

    On another GPU it so stays the same run.
    """
    written = Path(config.run_dir) / "config.yaml"
    if config.train.micro_batch != AUTO or not written.is_file():
        return config
    before = load_run_config(written)
    found = before.train.micro_batch if isinstance(before, TrainConfig) else AUTO
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": found})})


def with_micro_batch(
    config: TrainConfig, members: int, accelerator: Accelerator, checkpointing: Checkpointing = False
) -> TrainConfig:
    """Return the config with a number in the place of `train.micro_batch: auto`, the same on all processes.

    checkpointing: the kind in the place of `model.gradient_checkpointing: auto`.
    """
    if config.train.micro_batch != AUTO:
        return config
    found = [_found(config, members, accelerator, checkpointing) if accelerator.is_main_process else AUTO]
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": found[0]})})


def open_fitting(config: TrainConfig, members: int, accelerator: Accelerator) -> tuple[TrainConfig, Backbone]:
    """Return the config with the micro-batch in the place of `auto`, and its backbone, checkpointed as it fits."""
    checkpointing = chosen_checkpointing(config, members, accelerator)
    config = with_micro_batch(config, members, accelerator, checkpointing)
    note_other_base(config.tune.init, config.model)
    backbone = open_backbone(config.model, str(accelerator.device))
    if config.model.gradient_checkpointing == "auto":
        backbone.checkpoint(checkpointing)
    return config, backbone


def chosen_checkpointing(config: TrainConfig, members: int, accelerator: Accelerator) -> Checkpointing:
    """Return what `model.gradient_checkpointing` stands for, the same on all processes.

    With `train.micro_batch: auto`, too, it is chosen for the usual micro-batch.
    """
    wanted = config.model.gradient_checkpointing
    if wanted != "auto":
        return wanted
    if accelerator.device.type != "cuda":
        return False
    found: list[Checkpointing] = [_chosen(config, members, accelerator) if accelerator.is_main_process else True]
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    return found[0]


def _chosen(config: TrainConfig, members: int, accelerator: Accelerator) -> Checkpointing:
    each = max(1, config.train.groups_per_step // accelerator.num_processes)
    micro_batch = min(config.train.micro_batch or usual_micro_batch(each), each)
    prediction = predicted(config, accelerator)
    found = fitting_checkpointing(prediction, micro_batch, members, gpu_room())
    name = "kept outputs of attention" if found == "attention" else "on" if found else "off"
    say(
        f"model.gradient_checkpointing=auto: {name}, predicted for {micro_batch} groups in {gpu_room() / 2**30:.0f} GiB"
    )
    return found


def _found(config: TrainConfig, members: int, accelerator: Accelerator, checkpointing: Checkpointing = False) -> int:
    """Return the micro-batch that fits this process's device."""
    each = max(1, config.train.groups_per_step // accelerator.num_processes)
    if accelerator.device.type != "cuda":
        return usual_micro_batch(each)
    prediction = predicted(config, accelerator)
    if config.model.gradient_checkpointing == "auto":
        prediction.backbone.checkpoint(checkpointing)
    found = fitting_micro_batch(prediction, members, gpu_room())
    say(f"train.micro_batch=auto: {found} groups, predicted to fit {gpu_room() / 2**30:.0f} GiB")
    return found


def planned_conditioning(config: TrainConfig, backbone: Backbone) -> dict[str, Tensor]:
    """Return the conditioning of one prompt to plan with, and of an image to edit where the dataset has such images."""
    known = backbone.device.type == "meta"
    conditioning = empty_conditioning(backbone) if known else backbone.encode_prompts([""])
    folder = config.data.path
    if backbone.condition is not None and folder is not None and any((folder / CONDITIONS).glob("*.parquet")):
        side = (config.data.resolution or backbone.default_resolution) // backbone.vae_scale_factor
        conditioning[backbone.condition] = torch.empty(1, backbone.latent_channels, side, side, device="meta")
    return conditioning


def predicted(config: TrainConfig, accelerator: Accelerator) -> MemoryPrediction:
    """Return the prediction for this run, on a model without weights where its shapes are known."""
    cuda = accelerator.device.type == "cuda"
    backbone = planned_backbone(config.model) or open_backbone(config.model, "cpu")
    conditioning = planned_conditioning(config, backbone)
    return MemoryPrediction(config, backbone, conditioning, cuda=cuda, processes=accelerator.num_processes)
