"""Networks of rewards are built in their dtype: no copy in float32 is in memory on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffalign.rewards import Reward, load_reward
from diffalign.rewards.learned import LearnedReward
from helpers import pictures, tiny_rewards


def hpsv2(folder: Path) -> dict[str, Any]:
    path, _ = tiny_rewards.hps_checkpoint(folder)
    return {"weights": path, "architecture": "tiny-hps"}


def imagereward(folder: Path) -> dict[str, Any]:
    tiny_rewards.imagereward_checkpoint(folder)
    return {"weights": folder, "tokenizer": folder}


def pickscore(folder: Path) -> dict[str, Any]:
    tiny_rewards.clip_folder(folder)
    return {"weights": folder}


def aesthetic(folder: Path) -> dict[str, Any]:
    tiny_rewards.clip_folder(folder / "clip")
    tiny_rewards.aesthetic_head(folder / "aesthetic-model.pth", 24)
    return {"weights": folder, "clip": folder / "clip"}


Maker = Callable[[Path], dict[str, Any]]
MAKERS: dict[str, Maker] = {
    "hpsv2": hpsv2,
    "imagereward": imagereward,
    "pickscore": pickscore,
    "clipscore": pickscore,
    "aesthetic": aesthetic,
}


def network(reward: Reward) -> nn.Module:
    assert isinstance(reward, LearnedReward)
    found: nn.Module = reward.network
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["hpsv2", "imagereward"])
def test_the_network_has_no_memory_until_the_weights_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
    """It was built in float32, filled with a copy of the file, and cast: for 2 GB in float16 that took almost 6 GB."""
    reward = load_reward(name, **MAKERS[name](tmp_path), dtype=dtype)
    load, found = nn.Module.load_state_dict, []

    def watched(module: nn.Module, state: dict[str, torch.Tensor], **options: Any) -> Any:
        given = {
            value.dtype for key, value in state.items() if value.is_floating_point() and not key.startswith("head.")
        }
        found.append((all(p.is_meta for p in module.parameters()), given, options["assign"]))
        return load(module, state, **options)

    monkeypatch.setattr(nn.Module, "load_state_dict", watched)
    network(reward)
    assert found == [(True, {getattr(torch, dtype)}, True)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_parameter_has_the_dtype_and_memory(tmp_path: Path, name: str, dtype: str) -> None:
    """Heads that give the score stay in float32, as documented."""
    reward = load_reward(name, **MAKERS[name](tmp_path), dtype=dtype)
    built = network(reward)
    assert not any(t.is_meta for t in (*built.parameters(), *built.buffers()))
    dtypes = {n: p.dtype for n, p in built.named_parameters()}
    assert {d for n, d in dtypes.items() if not n.startswith("head.")} == {getattr(torch, dtype)}
    assert {d for n, d in dtypes.items() if n.startswith("head.")} <= {torch.float32}
    assert reward.score([pictures.smooth(1), pictures.smooth(2, 300, 200)], ["a red cat", "dog"]).isfinite().all()
