"""Runs whose model, data or records were moved resume on the same content, and are refused on any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign.data.convert import import_pairs
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.prompts import PromptRow
from diffalign.data.writer import write_groups
from diffalign.stages import fingerprints
from helpers.command_line import refused, run
from helpers.files import rows
from helpers.judge_run import make_judge_run


@pytest.fixture
def place(tmp_path: Path, sd3_dir: Path) -> Path:
    """A folder with a model, a dataset of four pairs, and the config of a run of two steps."""
    rng = np.random.default_rng(0)
    for side in ("win", "lose"):
        (tmp_path / side).mkdir()
        for n in range(4):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / side / f"{n}.png")
            (tmp_path / side / f"{n}.txt").write_text(f"picture number {n}")
    import_pairs([tmp_path / "win", tmp_path / "lose"], tmp_path / "data")
    shutil.copytree(sd3_dir, tmp_path / "model")
    (tmp_path / "c.yaml").write_text(
        f"run_dir: {tmp_path / 'run'}\ndevice: cpu\nmodel: {{path: {tmp_path / 'model'}, max_sequence_length: 12}}\n"
        f"data: {{path: {tmp_path / 'data'}, resolution: 32}}\nobjective: {{name: dpo, beta: 100.0}}\n"
        "train: {steps: 2, groups_per_step: 2}\ncheckpoint: {every: 1}\ntracking: {trackers: []}\n"
    )
    return tmp_path


def test_a_moved_model_data_and_run_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = place / "c.yaml"
    assert run("train", config, f"run_dir={place / 'straight'}", "train.steps=3") == 0
    assert run("train", config) == 0
    (place / "elsewhere").mkdir()
    moved = {}
    for key, name in (("model.path", "model"), ("data.path", "data"), ("run_dir", "run")):
        (place / name).rename(place / "elsewhere" / name)
        moved[key] = f"{key}={place / 'elsewhere' / name}"
    shutil.rmtree(place / "elsewhere/data/cache")  # its key holds the model's path
    capsys.readouterr()
    assert run("train", config, *moved.values(), "train.steps=3") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed: ")]
    assert all(f"{key} was " in line for key in moved) and line.endswith(": no number changes")
    assert rows(place / "elsewhere/run") == rows(place / "straight")

    # Other weights, other labels: at the new place as at the old one.
    weights = next((place / "elsewhere/model/vae").glob("*.safetensors"))
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert "belongs to another config: model.path was" in refused(
        capsys, "train", config, *moved.values(), "train.steps=4"
    )
    weights.write_bytes(before)
    dataset = PreferenceDataset(place / "elsewhere/data")
    groups = [dataset.group(n) for n in range(len(dataset))]
    write_groups(dataset.folder, [{**row, "preference": row["preference"][::-1]} for row in groups])
    assert "belongs to another config: data.path was" in refused(
        capsys, "train", config, *moved.values(), "train.steps=4"
    )


@pytest.mark.parametrize("key", ["optimizer.lr=3e-3", "seed=4", "objective.beta=7", "train.ema_decay=0.9"])
def test_keys_that_change_numbers_are_named_before_the_model_is_loaded(
    place: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in a dry run. The model is gone, and nobody looks for it."""
    assert run("train", place / "c.yaml") == 0
    shutil.rmtree(place / "model")
    for more in ([], ["--dry-run"]):
        said = refused(capsys, "train", place / "c.yaml", key, *more)
        assert f"belongs to another config: {key.split('=')[0]} was " in said and "delete" not in said


def test_a_judge_on_moved_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_judge_run(tmp_path, groups=4, steps=1, every=1)
    assert run("judge", config, f"run_dir={tmp_path / 'straight'}", "train.steps=2") == 0
    assert run("judge", config) == 0
    (tmp_path / "records").rename(tmp_path / "moved")
    (tmp_path / "base").rename(tmp_path / "moved/base")
    given = [f"data.pairs={tmp_path / 'moved/pairs.jsonl'}", f"model.path={tmp_path / 'moved/base'}", "train.steps=2"]
    assert run("judge", config, *given) == 0
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")
    with (tmp_path / "moved/pairs.jsonl").open("a") as stream:
        stream.write((tmp_path / "moved/pairs.jsonl").read_text().splitlines()[0] + "\n")
    assert "data.pairs was" in refused(capsys, "judge", config, *given[:2], "train.steps=3")


def test_prompts_are_compared_by_text_and_metadata() -> None:
    plain = [PromptRow("a cat"), PromptRow("a dog", {"tag": "x"})]
    assert fingerprints.of_prompts(plain) == fingerprints.of_prompts(list(plain))
    others = [
        plain[::-1],
        plain[:1],
        [plain[0], PromptRow("a dog", {"tag": "y"})],
        [plain[0], PromptRow("a dog ", {"tag": "x"})],
    ]
    assert all(fingerprints.of_prompts(other) != fingerprints.of_prompts(plain) for other in others)
