"""Full fine-tuning with weights, gradients and averages cut over the processes: torch's fully_shard (FSDP2).

Each process holds an equal slice of every tensor; a block's weights are gathered for its forward and its backward and then
given up again, and its gradients are averaged into slices. The frozen reference is cut as well. Slices are gathered in
float32. Not through accelerate, whose plugin exchanges parameters after the optimiser has them, and is plain DDP on CPUs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.files import replacing_folder
from diffalign.pipelines import Backbone

# torch.distributed's parts for this take most of a second to import, which runs without them need not wait for.


def shard(backbone: Backbone) -> None:
    """Cut the trunk, and the full reference where there is one, over all processes. Before the optimiser is built.

    Raises DiffalignError in a process that was started alone.
    """
    if not dist.is_initialized():
        raise DiffalignError(
            "train.shard=fsdp2: one process has nothing to cut its weights over; launch several with accelerate launch or "
            "torchrun, or set train.shard=none"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(backbone.device.type, (dist.get_world_size(),))
    for trunk in backbone.trunks():
        for module in list(trunk.modules()):
            if type(module).__name__ in backbone.blocks:
                fully_shard(module, mesh=mesh)
        fully_shard(trunk, mesh=mesh)


def _plain(value: Tensor) -> bool:
    return type(value) in (Tensor, nn.Parameter)


def whole(value: Tensor) -> Tensor:
    """Return a tensor gathered from all processes, which must all call this; one that is not cut as it is."""
    if _plain(value):
        return value
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def placed(value: Tensor, like: Tensor) -> Tensor:
    """Cut `value`, which every process has read whole, as `like` is cut."""
    if _plain(like):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return value
    local = value.to(like.device, like.dtype)
    return distribute_tensor(local, like.device_mesh, like.placements, src_data_rank=None)


def save_sharded(backbone: Backbone, folder: Path, *, write: bool) -> None:
    """Gather the policy's trunk and write it in diffusers' layout. All processes call this, and one has `write`."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FSDPModule

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(backbone.trunk, options=options)
    if not write:
        return
    # fully_shard gives the trunk a class of its own, whose name must not reach the saved config.
    kind: Any = next(c for c in type(backbone.trunk).__mro__ if not issubclass(c, FSDPModule))
    with torch.device("meta"):
        plain: nn.Module = kind.from_config(backbone.trunk.config)
    plain.load_state_dict(state, assign=True)
    with replacing_folder(folder) as part:
        backbone.save_trunk(plain, part)
