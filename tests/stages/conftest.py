"""A folder in which `synth` runs on models whose outputs are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffalign.config import GeneratorSection, RewardSection, load_synth_config
from diffalign.stages import synth
from helpers.synth_models import CONFIG, Channel, Painter


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """make(folder, *overrides, pause=0, prompts=...): run `synth` into tmp_path/folder with painters for models."""
    monkeypatch.setattr("diffalign.data.plan.IMAGES_PER_SHARD", 16)
    (tmp_path / "config.yaml").write_text(CONFIG.replace("PROMPTS", str(tmp_path / "prompts.txt")))
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(21)))

    def open_reward(section: RewardSection, device: str) -> Channel:
        return Channel(section.name)

    monkeypatch.setattr(synth, "open_reward", open_reward)

    def make(folder: str, *overrides: str, pause: float = 0.0, dry_run: bool = False) -> Path:
        log = tmp_path / "log"

        def open_generator(section: GeneratorSection, device: str) -> Painter:
            return Painter(section.name, log, pause)

        monkeypatch.setattr(synth, "open_generator", open_generator)
        config = load_synth_config(tmp_path / "config.yaml", [f"out={tmp_path / folder / 'data'}", *overrides])
        synth.synth(config, dry_run=dry_run)
        return tmp_path / folder / "data"

    return make
