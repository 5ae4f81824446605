"""Rounds on an untrained shapes-sd3: what each starts from, killed anywhere, when they stop; momentum in numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign import testbed
from diffalign.config import RoundsConfig, load_config, load_rounds_config
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.real_against_generated import write_real_against_generated
from diffalign.errors import DiffalignError
from diffalign.pipelines.lora_file import LORA_FILE
from diffalign.pipelines.momentum import extrapolate, extrapolate_lora
from diffalign.stages import rounds
from diffalign.stages.real_images import real_images
from diffalign.testbed.models import BUILDERS, autoencoder

TRAINING = [
    "train.steps=2", "train.groups_per_step=2", "train.micro_batch=2", "train.threads=1", "tune.rank=2", "tune.alpha=2.0",
    "tracking.trackers=[]", "data.group_size=null", "labels.source=preference",
]  # fmt: skip
SMALL = (
    "data.n=2", "data.images_per_prompt=2", "images.steps=2", "images.batch_size=4", "evaluate.n=2", "evaluate.seeds=1",
    "rounds=2", "patience=null", "data.rewards=[{name: sharpness}]", "evaluate.reward={name: sharpness}",
    f"overrides={json.dumps(TRAINING)}",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained shapes-sd3 in place of the shipped one."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "shapes-sd3"
    BUILDERS["shapes-sd3"](autoencoder("shapes-sd3")).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _untrained(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testbed, "model_path", lambda name: model)


def config(out: Path, *overrides: str, recipe: str = "rounds_shapes_gdro") -> RoundsConfig:
    return load_rounds_config(recipe, [f"out={out}", *SMALL, *overrides])


def lora(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "weights" / LORA_FILE)


def test_two_rounds_killed_between_and_inside_stages_end_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rounds.rounds(config(tmp_path / "whole"))
    assert [one["round"] for one in whole["rounds"]] == [1, 2] and whole["column"] == "sharpness.sharpness"
    first, second = (tmp_path / "whole" / f"round-0{n}" for n in (1, 2))
    assert (tmp_path / "whole" / "report.html").is_file() and (second / "run" / "report.html").is_file()

    # The second round starts from the first one's weights, which are its reference too, and draws its images from them.
    resolved = json.loads(json.dumps(load_config(second / "run" / "config.yaml").model_dump(mode="json")))
    assert resolved["tune"]["init"] == str(first / "run" / "weights") and resolved["tune"]["reference"] == "init"
    rows = [json.loads(line) for line in (second / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["drift"] == 0.0 and resolved["seed"] == 1
    data = [PreferenceDataset(folder / "data") for folder in (first, second)]
    assert data[0].column("prompt") != data[1].column("prompt")
    seeds = [{image.seed for rows in one.iter_images() for image in rows} for one in data]
    assert not seeds[0] & seeds[1]
    # Weights stay relative to the base: same layers and rank, other values.
    assert {k: v.shape for k, v in lora(first / "run").items()} == {k: v.shape for k, v in lora(second / "run").items()}
    assert any(not torch.equal(v, lora(second / "run")[k]) for k, v in lora(first / "run").items())

    # Killed before every stage in turn; each time the same command goes on.
    for place, name in enumerate(("sample", "score_images", "rank_dataset", "train", "evaluate")):
        with monkeypatch.context() as patch:
            real = getattr(rounds, name)

            def dies(*args: Any, after: int = place % 2, real: Any = real, **kwargs: Any) -> Any:
                if after:  # inside: the stage's work is done, but nobody has heard of it
                    real(*args, **kwargs)
                raise KeyboardInterrupt

            patch.setattr(rounds, name, dies)
            with pytest.raises(KeyboardInterrupt):
                rounds.rounds(config(tmp_path / "killed"))
    found = rounds.rounds(config(tmp_path / "killed"))
    for one, other in zip(found["rounds"], whole["rounds"], strict=True):
        assert {k: v for k, v in one.items() if k != "weights"} == {k: v for k, v in other.items() if k != "weights"}
    for name, value in lora(second / "run").items():
        assert torch.equal(value, lora(tmp_path / "killed" / "round-02" / "run")[name])

    with pytest.raises(DiffalignError, match="holds rounds of another config: momentum was 0.0, is now 0.5"):
        rounds.rounds(config(tmp_path / "killed", "momentum=0.5"))


def test_self_play_against_the_base_with_momentum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDO: real scenes and the model's own images; the reference stays the base; round 2 starts beyond round 1."""
    monkeypatch.setattr("diffalign.health.label_checks.PAIRS_NEEDED", 1)
    given = ("reference=base", "momentum=0.5", "data.rewards=[]")
    rounds.rounds(config(tmp_path, *given, recipe="rounds_shapes_ddo"))
    first, second = tmp_path / "round-01", tmp_path / "round-02"
    data = PreferenceDataset(second / "data")
    assert data.column("preference") == [[1.0, 0.0, 0.0]] * 2
    assert {data.generators()[key] for key in data.generators() if key[1] == 0} == {"real"}
    resolved = load_config(second / "run" / "config.yaml")
    assert resolved.tune.init == first / "next" and resolved.tune.reference == "base"
    before, start = lora(first / "run"), load_file(first / "next" / LORA_FILE)
    for name, value in before.items():
        torch.testing.assert_close(start[name], value * (1.5 if ".lora_B." in name else 1.0))
    # The policy starts elsewhere than its reference, and is not expected not to.
    rows = [json.loads(line) for line in (second / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["drift"] > 0
    # That every real image wins is what roles are, and no finding.
    assert "generators_explain_ranking" not in (second / "run" / "health.json").read_text()

    # Real images may also lie in a dataset; a prompt without one is named.
    [(row, image)] = real_images(str(first / "data"), "unused", 1, 0)
    one = PreferenceDataset(first / "data")
    assert row.prompt == one.column("prompt")[0] and image() == one.images(one.column("group_id")[0])[0].data
    with pytest.raises(DiffalignError, match=f"no real image of the prompt '{one.column('prompt')[1]}'"):
        write_real_against_generated([(row, image)], PreferenceDataset(first / "drawn"), tmp_path / "other")
    assert not (tmp_path / "other" / "groups.parquet").exists()
    with pytest.raises(DiffalignError, match="does not describe scenes"):
        real_images("testbed", str(_prompts(tmp_path)), None, 0)


def _prompts(folder: Path) -> Path:
    (folder / "prompts.txt").write_text("a red circle\n")
    return folder / "prompts.txt"


@pytest.mark.parametrize(
    ("scores", "patience", "expected"),
    [
        ([0.2, 0.3], 1, False),
        ([0.2, 0.2], 1, True),
        ([0.2, 0.3, 0.25], 1, True),
        ([0.2, 0.3, 0.25], 2, False),
        ([0.2, 0.3, 0.25, 0.3], 2, True),
        ([0.2, 0.1], None, False),
    ],
)
def test_when_rounds_stop(scores: list[float], patience: int | None, expected: bool) -> None:
    assert rounds.stops(scores, patience) is expected


def test_rounds_run_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(DiffalignError, match="rounds run in one process"):
        rounds.rounds(config(tmp_path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.reward={name: sharpnes}", "sharpnes"),
        ("evaluate.more_rewards=[{name: ocr}]", "ocr"),
        ("data.rewards=[]", "nothing makes labels"),
        ('overrides=["train.stepz=3"]', "unknown key train.stepz"),
    ],
)
def test_mistakes_are_found_before_anything_is_drawn_and_can_be_mended(
    override: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DiffalignError, match=message):
        rounds.rounds(config(tmp_path / "out", override))
    assert not (tmp_path / "out").exists()


def test_rounds_train_a_lora(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match="set tune.kind=lora"):
        rounds.train_config(config(tmp_path, "overrides=[tune.kind=full]"), 1, None)


# --- momentum ----------------------------------------------------------------------------------------------------


def test_momentum_on_one_layer_is_the_best_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)

    def factors() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(3, 7, generator=generator), torch.randn(9, 3, generator=generator)

    now, before = factors(), factors()
    a, b = extrapolate(now, before, 0.4)
    wanted = 1.4 * (now[1] @ now[0]).double().numpy() - 0.4 * (before[1] @ before[0]).double().numpy()
    u, s, vt = np.linalg.svd(wanted)
    assert a.shape == (3, 7) and b.shape == (9, 3)
    np.testing.assert_allclose((b @ a).numpy(), (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)
    # No change, no step; no earlier round, a longer one.
    np.testing.assert_allclose(*((y @ x).numpy() for x, y in (extrapolate(now, now, 0.4), now)), atol=1e-5)
    assert torch.equal(extrapolate(now, None, 0.5)[1], now[1] * 1.5)


def test_momentum_needs_loras_of_the_same_layers(tmp_path: Path) -> None:
    for name, rank in (("a", 2), ("b", 3)):
        (tmp_path / name).mkdir()
        tensors = {"t.x.lora_A.weight": torch.ones(rank, 4), "t.x.lora_B.weight": torch.ones(5, rank)}
        save_file(tensors, tmp_path / name / LORA_FILE, metadata={"k": "v"})
    with pytest.raises(DiffalignError, match="other layers or ranks"):
        extrapolate_lora(tmp_path / "a", tmp_path / "b", 0.5, tmp_path / "out")
