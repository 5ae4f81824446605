"""An optimiser's state as tensors and plain numbers, so that nothing is pickled."""

from typing import Any

import torch
from torch import Tensor

from diffalign.training.sharding import placed, whole

PlainState = dict[str, Any]
"""Numbers of parameters by `index/key`, and the options of the parameter groups."""


def _flatten(state: dict[Any, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimiser's per-parameter state as tensors and plain numbers, both named `index/key` or `index/dict/key`."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, entries in state.items():
        for key, value in entries.items():
            # bitsandbytes keeps its quantised tensors one level deeper.
            for name, item in (
                {f"{key}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
            ).items():
                (tensors if isinstance(item, Tensor) else scalars)[f"{index}/{name}"] = item
    return {k: whole(v).detach().cpu().contiguous() for k, v in tensors.items()}, scalars


def optimizer_record(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], PlainState]:
    """Return an optimiser's tensors, for a file of their own, and its plain numbers, for state.json."""
    state = optimizer.state_dict()
    tensors, scalars = _flatten(state["state"])
    groups = [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]]
    return tensors, {"scalars": scalars, "groups": groups}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: PlainState) -> None:
    """Put what `optimizer_record` returned into an optimiser of the same parameters."""
    entries: dict[int, dict[str, Any]] = {}
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, value in {**tensors, **plain["scalars"]}.items():
        index, *keys = name.split("/")
        place = entries.setdefault(int(index), {})
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        like = own[int(index)]
        place[keys[-1]] = placed(value, like) if isinstance(value, Tensor) and value.shape == like.shape else value
    groups = optimizer.state_dict()["param_groups"]
    restored = [{**stored, "params": g["params"]} for stored, g in zip(plain["groups"], groups, strict=True)]
    optimizer.load_state_dict({"state": entries, "param_groups": restored})
