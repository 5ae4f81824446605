"""The quickstart's round, with an untrained model: every stage runs, is kept, and shares what it may share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign import testbed
from diffalign.data.dataset import PreferenceDataset
from diffalign.stages import quickstart
from diffalign.testbed.models import BUILDERS, autoencoder
from diffalign.testbed.shape_prompts import draw_prompts


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An untrained shapes-sd3 in place of the shipped one, and rounds of a handful of images."""
    torch.manual_seed(0)
    folder = tmp_path / "shapes-sd3"
    BUILDERS["shapes-sd3"](autoencoder("shapes-sd3")).save_pretrained(folder)
    monkeypatch.setattr(testbed, "model_path", lambda name: folder)
    monkeypatch.setattr(quickstart, "SAMPLING", {"steps": 2, "guidance_scale": 2.0, "batch_size": 8, "device": "cpu"})
    monkeypatch.setattr(quickstart, "IMAGES_PER_GROUP", 2)
    monkeypatch.setattr(quickstart, "TEST_PROMPTS", 2)
    return folder


def random_scores(dataset: PreferenceDataset, reward: Any) -> int:
    """An untrained model draws no shape, so the real reward would prefer nothing."""
    from diffalign.data.score import score_images

    rng = torch.Generator().manual_seed(0)
    measure = reward.measure
    reward.measure = lambda *a: {k: torch.rand(v.shape, generator=rng) for k, v in measure(*a).items()}
    return score_images(dataset, reward)


def test_one_round(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "score_images", random_scores)
    given: dict[str, Any] = {
        "base": "shapes-sd3",
        "seed": 3,
        "steps": 2,
        "groups": 4,
        "overrides": ("train.threads=1", "train.groups_per_step=2", "train.micro_batch=2"),
    }
    result = quickstart.quickstart(out=tmp_path / "one", **given)
    assert result["prompts"] == [row["prompt"] for row in draw_prompts("test", 2)]
    assert set(result["scores"]["geneval.dense"]) >= {"all"}
    run = tmp_path / "one" / "run"
    assert (run / "report.html").is_file() and len((run / "metrics.jsonl").read_text().splitlines()) == 2
    # Again: nothing is drawn, scored or trained anew, and the result is the same.
    assert quickstart.quickstart(out=tmp_path / "one", **given)["scores"] == result["scores"]


def test_the_control_differs_in_its_labels_alone(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "score_images", random_scores)
    given: dict[str, Any] = {"base": "shapes-sd3", "steps": 1, "groups": 8, "overrides": ("train.threads=1",)}
    for shuffle in (False, True):
        quickstart.quickstart(out=tmp_path / str(shuffle), shuffle=shuffle, base_images=tmp_path / "base", **given)
    true, control = (PreferenceDataset(tmp_path / str(s) / "data") for s in (False, True))
    assert [i.data for r in true.iter_images() for i in r] == [i.data for r in control.iter_images() for i in r]
    assert true.column("preference") != control.column("preference")
    images = [json.loads((tmp_path / str(s) / "run" / "eval.json").read_text())["images"] for s in (False, True)]
    assert images[0]["base"] == images[1]["base"] and images[0]["tuned"] != images[1]["tuned"]


def test_held_out_prompts_share_nothing_with_training() -> None:
    train, test = ({row["prompt"] for row in draw_prompts(split, 256)} for split in ("train", "test"))
    assert not train & test
