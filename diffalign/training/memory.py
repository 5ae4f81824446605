"""Peak memory of a training step, predicted part by part before anything is put on a GPU.

    peak = weights + reference + adapters + optimiser + average + gradients + activations (+ gathered, with train.shard)

All parts but activations follow from counts: bytes of the frozen weights as they are stored; 4 bytes a trained number for its
gradient and for its average; for the optimiser see `optimizer_bytes`. Activations are counted: the step runs on the meta
device, where tensors have shapes and no contents, and what is alive at its fullest moment is summed. Attention counts as
torch's fused kernels keep it, and autocast as CUDA's rules have it. What a CUDA context, cuBLAS's workspaces and the
allocator's rounding take is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.config import TrainConfig
from diffalign.pipelines import Backbone
from diffalign.pipelines.checkpointing import Checkpointing
from diffalign.training.cuda_rules import LiveBytes, step_on_meta
from diffalign.training.device import bf16_throughout, precision_of
from diffalign.training.preference.policy import build_objective, prepare_policy

LARGEST = 16
"""Groups in a micro-batch beyond which a GPU is busy anyway."""
BLOCK, SMALL = 256, 4096
"""bitsandbytes' 8-bit states: a float32 scale for BLOCK numbers; tensors smaller than SMALL stay in 32 bits."""


def stored_bytes(module: nn.Module | None, wanted: Callable[[str], bool] = lambda _: True) -> int:
    """Return the bytes of a module's parameters and buffers whose names are wanted, with the scales of 4-bit weights."""
    if module is None:
        return 0
    total = 0
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if wanted(name):
            state = vars(value).get("quant_state")  # of bitsandbytes' 4-bit weights
            total += value.nbytes + (_state_bytes(state) if state is not None else 0)
    return total


def _state_bytes(state: Any) -> int:
    """Return the bytes of a 4-bit weight's scales; with double quantisation they are 8-bit numbers with scales of their own."""
    nested = _state_bytes(state.state2) if state.nested else 0
    return int(state.absmax.nbytes) + int(state.code.nbytes) + nested


def optimizer_bytes(name: str, parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes that an optimiser keeps beside the weights, after its first step.

    adamw: two float32 averages a number, and a float32 counter a tensor. adamw8bit: two bytes a number and two float32
    scales for every 256; tensors below 4,096 numbers as adamw without the counter. adafactor: for a tensor of two or more
    dimensions the float32 means over its last and over its last but one, for others one float32 a number.
    """
    total = 0
    for parameter in parameters:
        n, shape = parameter.numel(), parameter.shape
        if name == "adafactor":
            total += 4 * (n if len(shape) < 2 else n // shape[-1] + n // shape[-2])
        elif name == "adamw8bit":
            total += 8 * n if n < SMALL else 2 * n + 2 * 4 * -(-n // BLOCK)
        else:
            total += 8 * n + 4
    return total


def to_meta(backbone: Backbone) -> None:
    """Leave only the shapes of the trunk. The backbone can still predict, without numbers."""
    from diffalign.pipelines.quantize import as_shapes

    as_shapes(backbone.trunk)
    backbone.trunk.to("meta")
    backbone.device = torch.device("meta")


def step_peak(
    backbone: Backbone,
    latents: tuple[int, ...],
    conditioning: dict[str, Tensor],
    *,
    reference: bool,
    autocast: torch.dtype | None,
    micro_batches: int = 1,
) -> tuple[int, int]:
    """Return the bytes at the fullest moment of forward and backward, and how many of them are gradients when all are there.

    Weights and optimiser are not counted. From the second of several micro-batches on, all gradients are there while
    activations are. For the arguments see `step_on_meta`.
    """
    trained = list(backbone.trainable().values())
    with LiveBytes() as live:
        live.ignore([weight for module in backbone.trunks() for weight in module.parameters()])
        for _ in range(min(micro_batches, 2)):
            step_on_meta(backbone, latents, conditioning, reference=reference, autocast=autocast)
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    for parameter in trained:
        parameter.grad = None
    return live.peak, gradients


def gathered_bytes(backbone: Backbone) -> int:
    """Return the bytes that fsdp2 gathers during a step.

    Of each trunk the weights outside its blocks, which stay whole, and two blocks (one at work, one on its way); of the
    policy as much again for their gradients.
    """
    total = 0
    for trunk in backbone.trunks():
        blocks = [stored_bytes(m) for m in trunk.modules() if type(m).__name__ in backbone.blocks]
        whole = stored_bytes(trunk) - sum(blocks) + 2 * max(blocks)
        total += 2 * whole if trunk is backbone.trunk else whole
    return total


class MemoryPrediction:
    """What a process of a training run will hold, for steps of any size.

    `backbone` is untuned, on the CPU or on the meta device, and unusable afterwards. conditioning: of one prompt. processes:
    over how many the weights are cut where train.shard is fsdp2. `trainable`: the numbers that are trained.
    """

    def __init__(
        self,
        config: TrainConfig,
        backbone: Backbone,
        conditioning: dict[str, Tensor],
        *,
        cuda: bool,
        processes: int = 1,
    ) -> None:
        self.config, self.backbone, self.conditioning = config, backbone, conditioning
        self.processes = processes
        self.objective = build_objective(config.objective)
        self.frozen = stored_bytes(backbone.trunk)
        to_meta(backbone)
        # Whole, uncompiled and from no file: none of it changes a shape.
        plain = {
            "model": config.model.model_copy(update={"compile": False}),
            "train": config.train.model_copy(update={"shard": "none"}),
            "tune": config.tune.model_copy(update={"init": None, "reference": "init"}),
        }
        prepare_policy(config.model_copy(update=plain), backbone, self.objective)
        self.trained = list(backbone.trainable().values())
        self.trainable = sum(p.numel() for p in self.trained)
        precision = precision_of(config, cuda=cuda)
        if bf16_throughout(config, cuda=cuda):
            backbone.compute_low()
            precision = "no"
        self.autocast = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def parts(self, latents: tuple[int, ...], micro_batch: int) -> dict[str, int]:
        """Return bytes by part, `peak` their sum, and `host` what the optimiser keeps in the host's memory.

        latents: [images of a micro-batch, C, h, w]. micro_batch: its groups.
        """
        config, backbone, objective, tune = self.config, self.backbone, self.objective, self.config.tune
        peak, gradients = step_peak(
            backbone,
            latents,
            self.conditioning,
            reference=objective.needs_reference,
            autocast=self.autocast,
            micro_batches=-(-config.train.groups_per_step // (micro_batch * self.processes)),
        )
        states = optimizer_bytes(config.optimizer.name, self.trained)
        cut = self.processes if config.train.shard == "fsdp2" else 1
        moves = tune.reference_moves
        own_reference = moves or (tune.init is not None and tune.reference == "init")
        full = tune.kind == "full"
        if full:
            reference = self.frozen // cut if objective.needs_reference and not moves else 0
            if moves:  # a copy in float32, and the base beside it where the loss is anchored to it
                reference = 4 * self.trainable + (self.frozen if objective.needs_anchor_gap else 0)
        else:
            reference = 4 * self.trainable if own_reference else 0
        parts = {
            "weights": stored_bytes(backbone.trunk) // cut if full else self.frozen,
            "reference": reference,
            "adapters": 0 if full else 4 * self.trainable,
            "optimiser": 0 if config.optimizer.offload else states // cut,
            "average": 4 * self.trainable // cut if config.train.ema_decay else 0,
            "gradients": gradients // cut,
            "activations": max(0, peak - gradients),
            "gathered": gathered_bytes(backbone) if cut > 1 else 0,
        }
        return {**parts, "peak": sum(parts.values()), "host": states if config.optimizer.offload else 0}

    def of_groups(self, micro_batch: int, members: int) -> tuple[int, dict[str, int]]:
        """Return the images in the model at a time and the parts, for micro-batches of so many groups of `members` images."""
        config, backbone = self.config, self.backbone
        used = {"best": 1, "best_worst": 2, "all": config.data.group_size or members}
        images = micro_batch * used[config.objective.kind.members]
        images = min(images, config.train.images_per_pass or images)
        side = (config.data.resolution or backbone.default_resolution) // backbone.vae_scale_factor
        return images, self.parts((images, backbone.latent_channels, side, side), micro_batch)


def predict_memory(
    config: TrainConfig,
    backbone: Backbone,
    latents: tuple[int, ...],
    conditioning: dict[str, Tensor],
    *,
    cuda: bool,
    processes: int = 1,
) -> dict[str, int]:
    """Return the parts of one `MemoryPrediction` for the config's own micro-batch."""
    prediction = MemoryPrediction(config, backbone, conditioning, cuda=cuda, processes=processes)
    return prediction.parts(latents, config.train.micro_batch)


def described(prediction: MemoryPrediction, micro_batch: int, members: int) -> dict[str, str]:
    """Describe the memory of a micro-batch of groups with `members` images each, for `--dry-run`."""
    images, parts = prediction.of_groups(micro_batch, members)
    host = parts.pop("host")
    sizes = {name: f"{size / 2**30:.3f} GiB" for name, size in parts.items() if size}
    sizes["peak"] += f", in a step of {images} images at a time; beside it a CUDA context and the allocator's rounding"
    return sizes | ({"host": f"{host / 2**30:.3f} GiB (optimizer.offload)"} if host else {})


def fitting_micro_batch(prediction: MemoryPrediction, members: int, room: int) -> int:
    """Return the largest number of groups in a micro-batch whose step fits into `room` bytes; 1 where none does.

    It divides the groups of a process's step. Activations grow evenly with the groups, so two sizes tell all.
    """
    each = max(1, prediction.config.train.groups_per_step // prediction.processes)
    sizes = [n for n in range(min(each, LARGEST), 0, -1) if each % n == 0]
    one = prediction.of_groups(1, members)[1]["peak"]
    if len(sizes) == 1 or one > room:
        return 1
    second = sizes[-2]
    growth = (prediction.of_groups(second, members)[1]["peak"] - one) / (second - 1)
    return next((size for size in sizes if one + growth * (size - 1) <= room), 1)


def fitting_checkpointing(prediction: MemoryPrediction, micro_batch: int, members: int, room: int) -> Checkpointing:
    """Return the fastest kind of gradient checkpointing whose step is predicted to fit into `room` bytes; True if none is."""
    kinds: tuple[Checkpointing, ...] = (False, "attention")
    for kind in kinds:
        prediction.backbone.checkpoint(kind)
        if prediction.of_groups(micro_batch, members)[1]["peak"] <= room:
            return kind
    prediction.backbone.checkpoint(True)
    return True
