"""Tiny judges, one of each family, made once for all tests of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffalign.rewards import Reward, load_reward
from diffalign.rewards.chat_api import ChatAPI
from diffalign.rewards.judge import Judge, load_judge
from helpers import tiny_rewards, tiny_vlm
from helpers.judge_inputs import RUBRICS


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let requests to a model behind an address be repeated at once."""
    init = ChatAPI.__init__
    monkeypatch.setattr(ChatAPI, "__init__", lambda self, *a, **k: init(self, *a, **{"pause": 0.001, **k}))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("judges")
    return {family: tiny_vlm.qwen_folder(root / family, family, noise=0.15) for family in tiny_vlm.FAMILIES}


@pytest.fixture(scope="session")
def judges(folders: dict[str, Path]) -> dict[str, Judge]:
    return {family: load_judge(folder, rubrics=RUBRICS) for family, folder in folders.items()}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_rewards.clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def hps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    return tiny_rewards.hps_checkpoint(tmp_path_factory.mktemp("hps"))


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("blip")
    return folder, tiny_rewards.imagereward_checkpoint(folder)


@pytest.fixture(scope="module")
def rewards(
    clip: Path, hps: tuple[Path, dict], blip: tuple[Path, dict], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Reward]:
    head = tmp_path_factory.mktemp("head") / "head.pth"
    tiny_rewards.aesthetic_head(head, 24)
    return {
        "pickscore": load_reward("pickscore", weights=clip),
        "clipscore": load_reward("clipscore", weights=clip),
        "hpsv2": load_reward("hpsv2", weights=hps[0], architecture="tiny-hps"),
        "imagereward": load_reward("imagereward", weights=blip[0], tokenizer=blip[0]),
        "aesthetic": load_reward("aesthetic", weights=head, clip=clip),
        "sharpness": load_reward("sharpness"),
    }
