"""The objective that a config names, and the policy that learns it."""

import torch

from diffalign.config import ObjectiveSection, TrainConfig
from diffalign.objectives import Objective
from diffalign.pipelines import Backbone
from diffalign.training.sharding import shard
from diffalign.training.tune import make_trainable


def build_objective(section: ObjectiveSection) -> Objective:
    """Build the objective that a config's `objective` section names."""
    return section.build()


PAYS = 2000
"""Steps from which on `compile: auto` compiles. Ours, and not measured on a GPU: 0.1 s less a step would save 200 s."""


def compiles(config: TrainConfig, *, cuda: bool) -> bool:
    """Return what `model.compile` stands for on such a device."""
    wanted = config.model.compile
    if wanted == "auto":
        plain = config.model.quantize == "none" and config.train.shard == "none"
        return cuda and plain and config.train.steps >= PAYS
    return wanted


def prepare_policy(config: TrainConfig, backbone: Backbone, objective: Objective) -> bool:
    """Make the policy trainable; return whether it equals the reference by construction."""
    tune = config.tune
    own = tune.reference != "base"
    make_trainable(backbone, tune, config.seed, keep_reference=objective.needs_reference, init_is_reference=own)
    if tune.reference_moves:
        backbone.follow_policy(keep_base=objective.needs_anchor_gap)
    if config.train.shard == "fsdp2":
        shard(backbone)
    if compiles(config, cuda=backbone.device.type == "cuda"):
        backbone.compile_blocks(dynamic=config.data.buckets != "none")
        # Graphs with and without gradient may round differently in 16 bits.
        return False
    if tune.kind == "full" and not tune.reference_moves:
        # The policy trains in float32; a reference kept in half precision rounds differently.
        return backbone.dtype == torch.float32
    return own or tune.init is None
