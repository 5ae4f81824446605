"""Tiny judges, one of each family, made once for all tests of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffalign.rewards.judge import Judge, load_judge
from helpers import tiny_vlm
from helpers.judge_inputs import RUBRICS


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("judges")
    return {family: tiny_vlm.qwen_folder(root / family, family, noise=0.15) for family in tiny_vlm.FAMILIES}


@pytest.fixture(scope="session")
def judges(folders: dict[str, Path]) -> dict[str, Judge]:
    return {family: load_judge(folder, rubrics=RUBRICS) for family, folder in folders.items()}
