"""Prompts and images that a reward of `synth` cannot score, and the device that it scores on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.config import RewardSection
from diffalign.data.dataset import PreferenceDataset
from diffalign.errors import DiffalignError
from diffalign.stages import synth
from helpers.synth_models import Channel


class Quoted(Channel):
    """As `ocr`: it needs a text in quotes, and ends with an error where no prompt of a batch has one."""

    def reason_not_scorable(self, prompt: str | None, metadata: dict[str, Any]) -> str:
        return "" if '"' in (prompt or "") or metadata.get("tag") else "no quotes"

    def measure(self, images: list[Image.Image], prompts: list[str], facts: Any = None) -> dict[str, Any]:
        for prompt, fact in zip(prompts, facts, strict=True):
            if reason := self.reason_not_scorable(prompt, fact):
                raise DiffalignError(f"prompt {prompt!r}: {reason}")
        return super().measure(images, prompts, facts)


def quoted(section: RewardSection, device: str) -> Channel:
    return (Quoted if section.name == "red" else Channel)(section.name)


@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize(
    "scorable",
    [lambda i: i % 2 == 0, lambda i: i > 15, lambda i: i == 20, lambda i: i < 5],
    ids=["half", "end", "last", "start"],
)
def test_a_prompt_that_a_reward_cannot_use_costs_only_its_images(
    batch: int,
    scorable: Callable[[int], bool],
    world: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """However the prompts fall into batches, the scoring ends, and every image has a score or the reason."""
    monkeypatch.setattr(synth, "open_reward", quoted)
    prompts = [f'sign "{i}"' if scorable(i) else f"prompt {i}" for i in range(21)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    without = sum(not scorable(i) for i in range(21))
    out = world("some", f"reward_batch={batch}")
    told = " ".join(capsys.readouterr().out.split())
    assert f"red: {without} of 21 prompts cannot be scored, the first: no quotes" in told
    assert f"red: {3 * without} images have no score: no quotes" in told
    dataset = PreferenceDataset(out)
    place = dict(zip(dataset.column("group_id"), dataset.column("prompt"), strict=True))
    for (group, _), score in dataset.scores("red").items():
        assert np.isfinite(score) == ('"' in place[group])
    # The other reward ranks them.
    assert all(len(preference) == 3 for preference in dataset.column("preference"))


def test_facts_of_a_prompt_count_too(
    world: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synth, "open_reward", quoted)
    rows = [{"prompt": f"prompt {i}", **({"tag": "counting"} if i % 3 else {})} for i in range(21)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = PreferenceDataset(world("facts", f"prompts.source={tmp_path / 'prompts.jsonl'}")).scores("red")
    assert sum(np.isnan(score) for score in scores.values()) == 21


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_reward_that_can_score_no_prompt_is_refused_before_drawing(
    dry_run: bool, world: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synth, "open_reward", quoted)
    with pytest.raises(DiffalignError, match=r"rewards: red cannot score any prompt of .*prompts\.txt: no quotes"):
        world("none", dry_run=dry_run)
    assert not (tmp_path / "log").exists() and not (tmp_path / "none").exists()


@pytest.mark.parametrize("first", ["prompt", "sign"])
def test_a_dry_run_times_what_can_be_scored(
    first: str,
    world: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(synth, "open_reward", quoted)
    last = 'sign "{}"' if first == "prompt" else "prompt {}"
    start = "prompt {}" if first == "prompt" else 'sign "{}"'
    (tmp_path / "prompts.txt").write_text("\n".join((start if i < 15 else last).format(i) for i in range(21)))
    world("dry", dry_run=True)
    told = capsys.readouterr().out
    assert ("red: none of the drawn prompts can be scored" in told) == (first == "prompt")
    assert re.search(r"  bright: [\d.e-]+ s an image", told)


@pytest.mark.parametrize("wanted", ["cpu", "cuda", "cuda:1"])
def test_rewards_score_on_the_device_and_the_score_file_does_not_name_it(
    wanted: str, world: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a set begun on one device can be scored further on another."""
    devices: list[str] = []

    def open_reward(section: RewardSection, device: str) -> Channel:
        devices.append(device)
        return Channel(section.name)

    monkeypatch.setattr(synth, "open_reward", open_reward)
    monkeypatch.setattr(synth, "process_device", lambda _: wanted)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    dataset = PreferenceDataset(world("set"))
    assert devices == [wanted] * 2
    for name in ("red", "bright"):
        assert wanted not in json.dumps(dataset.scored_by(name)) and "device" not in json.dumps(dataset.scored_by(name))


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "clipscore", "aesthetic", "unifiedreward", "vqascore"])
def test_a_reward_opens_on_the_device_and_its_settings_leave_it_out(name: str) -> None:
    from diffalign.stages.resolve_rewards import open_reward

    reward: Any = open_reward(RewardSection(name=name), "cuda")
    assert str(reward.device) == "cuda" and "device" not in reward.options()
    given: Any = open_reward(RewardSection(name=name, options={"device": "cpu"}), "cuda")
    assert str(given.device) == "cpu" and "device" not in given.options()


class Choosy(Channel):
    """Fails on a batch with a prompt of one kind, as a reward does on a picture that it cannot take."""

    def measure(self, images: list[Image.Image], prompts: list[str], facts: Any = None) -> dict[str, Any]:
        if any("odd" in prompt for prompt in prompts):
            raise ValueError("this picture is odd")
        return super().measure(images, prompts, facts)


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_an_image_on_which_a_reward_fails_costs_only_itself(
    batch: int, world: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synth, "open_reward", lambda section, device: Choosy(section.name))
    (tmp_path / "prompts.txt").write_text("\n".join(f"{'odd' if i % 9 == 4 else 'prompt'} {i}" for i in range(21)))
    dataset = PreferenceDataset(world("choosy", f"reward_batch={batch}"))
    place = dict(zip(dataset.column("group_id"), dataset.column("prompt"), strict=True))
    for (group, _), score in dataset.scores("red").items():
        assert np.isfinite(score) == ("odd" not in place[group])
    assert dataset.column("dropped").count("fewer than two images left") == 2  # nobody scored them


def test_a_reward_that_fails_on_all_images_ends_the_scoring(
    world: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synth, "open_reward", lambda section, device: Choosy(section.name))
    (tmp_path / "prompts.txt").write_text("\n".join(f"odd {i}" for i in range(21)))
    with pytest.raises(ValueError, match="this picture is odd"):
        world("odd")


class Short(Channel):
    """A reward that reads four words."""

    longest = 4

    def lengths(self, prompts: list[str]) -> list[int]:
        return [len(prompt.split()) for prompt in prompts]


def test_long_prompts_are_counted_in_one_line(
    world: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Once for each generator (which reads five words here) and for each reward that reads a part of them only."""
    monkeypatch.setattr(
        synth, "open_reward", lambda section, device: (Short if section.name == "red" else Channel)(section.name)
    )
    prompts = [" ".join(["word"] * (1 + i % 7)) + f" {i}" for i in range(21)]  # of two to eight words
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    world("some")
    told = [line for line in capsys.readouterr().out.splitlines() if "were cut" in line]
    generators = [line for line in told if not line.startswith("red ")]
    assert generators and len(set(generators)) == len(generators)
    assert all(
        line.endswith(" reads 5 tokens of a prompt: 9 of 21 prompts are longer and were cut") for line in generators
    )
    assert [line for line in told if line.startswith("red ")] == [
        "red reads 4 tokens of a prompt: 12 of 21 prompts are longer and were cut"
    ]
