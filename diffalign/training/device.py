"""Devices and processes: accelerate's view of them, a process's share of a step, tensors on their way to a GPU."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from diffalign.config import BackboneRunConfig, TrainConfig
from diffalign.errors import DiffalignError

LIMIT = timedelta(days=7)
"""How long a process waits in a collective for one that is still at work; that one died is for the launcher to notice."""


def precision_of(config: BackboneRunConfig, *, cuda: bool) -> str:
    """Return what `train.mixed_precision` stands for on such a device: no, bf16 or fp16."""
    precision: str = config.train.mixed_precision
    if precision == "auto":
        return "bf16" if cuda else "no"
    return precision


def bf16_throughout(config: BackboneRunConfig, *, cuda: bool) -> bool:
    """Return whether a step computes in bfloat16 without autocast: a LoRA on frozen weights that are bfloat16 themselves.

    Autocast would make the norms' outputs float32 and cast them back before every product. Quantised and sharded weights keep
    it, and so do trainers beside `train`, whose other networks are float32.
    """
    plain = isinstance(config, TrainConfig) and config.model.quantize == "none" and config.train.shard == "none"
    half = config.model.dtype == "bfloat16" and precision_of(config, cuda=cuda) == "bf16"
    return plain and half and config.tune.kind == "lora"


def start_accelerator(config: BackboneRunConfig) -> Accelerator:
    """Start accelerate on the config's device, in its precision.

    Raises DiffalignError where the launcher started other processes than accelerate sees.
    """
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    precision = precision_of(config, cuda=not cpu)
    if bf16_throughout(config, cuda=not cpu):
        precision = "no"  # nothing is left for autocast to cast
    accelerator = Accelerator(
        mixed_precision=precision, cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=LIMIT)]
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        # Otherwise each process would believe it is alone, and all would write the same files.
        raise DiffalignError(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}; on a machine without a GPU "
            "set ACCELERATE_USE_CPU=true and launch with torchrun"
        )
    return accelerator


@dataclass(frozen=True)
class Share:
    """This process's part of a step. slots: its positions in the step; micro: how many of them make a micro-batch."""

    slots: range
    micro: int

    def micro_batches(self) -> list[list[int]]:
        """Return the slots of each micro-batch."""
        return [list(range(start, start + self.micro)) for start in self.slots[:: self.micro]]


def share_of_step(per_step: int, micro_batch: int, accelerator: Accelerator, unit: str) -> Share:
    """Cut the `per_step` groups or images of a step over the processes, and each part into micro-batches.

    unit: "groups" or "images". Raises DiffalignError where they cannot be cut evenly.
    """
    each, rest = divmod(per_step, accelerator.num_processes)
    micro = min(micro_batch, each)
    if rest or each % micro:
        raise DiffalignError(
            f"train.{unit}_per_step={per_step} cannot be cut into micro-batches of {micro_batch} {unit} over "
            f"{accelerator.num_processes} processes; make it a multiple of their product"
        )
    first = accelerator.process_index * each
    return Share(range(first, first + each), micro)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return `values` on the device, without waiting for a GPU.

    They go by way of pinned memory, so that the host can do the next thing at once; torch keeps the pinned copy until the
    GPU has read it.
    """
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
