"""A checkpoint in one file is trained on and drawn from through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from diffalign.data.convert import import_pairs
from helpers import original_layout
from helpers.command_line import run


def test_train_sample_and_export(sd15_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my model.safetensors"
    original_layout.write(file, original_layout.whole(DiffusionPipeline.from_pretrained(sd15_dir)))
    rng = np.random.default_rng(0)
    for side in ("win", "lose"):
        (tmp_path / side).mkdir()
        for n in range(2):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / side / f"{n}.png")
            (tmp_path / side / f"{n}.txt").write_text(f"picture number {n}")
    import_pairs([tmp_path / "win", tmp_path / "lose"], tmp_path / "data")
    config = tmp_path / "c.yaml"
    losses = {}
    for name, model in (
        ("file", f"{{path: '{file}', config: '{sd15_dir}'}}"),
        ("folder", f"{{path: '{sd15_dir}'}}"),
    ):
        config.write_text(
            f"run_dir: {tmp_path / name}\ndevice: cpu\nmodel: {model}\n"
            f"data: {{path: {tmp_path / 'data'}, resolution: 32, cache_dir: {tmp_path / 'cache' / name}}}\n"
            "objective: {name: dpo, beta: 100.0}\ntrain: {steps: 2, groups_per_step: 2}\ncheckpoint: {every: 1}\n"
            "tracking: {trackers: []}\n"
        )
        assert run("train", config) == 0
        assert run("train", config) == 0  # complete; it resumes to the same
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["loss"] for row in rows]
    assert losses["file"] == pytest.approx(losses["folder"], rel=1e-6)
    assert "from_single_file" in (tmp_path / "file/README.md").read_text()

    sampling = tmp_path / "s.yaml"
    sampling.write_text(
        f"kind: sample\nmodel: {{path: '{file}', config: '{sd15_dir}'}}\nprompts: testbed:test\nn: 1\nsteps: 1\n"
        f"images_per_prompt: 1\nheight: 32\nwidth: 32\nweights: {tmp_path / 'file/weights'}\nout: {tmp_path / 'out'}\n"
    )
    assert run("sample", sampling) == 0
    assert run("export", tmp_path / "file", "--format", "merged", "--out", tmp_path / "merged") == 0
    assert (tmp_path / "merged/model_index.json").is_file()
    capsys.readouterr()
    assert run("sample", sampling, f"model.config={tmp_path / 'nowhere'}", f"out={tmp_path / 'x'}") == 2
    said = capsys.readouterr().err
    assert "does not exist" in said and len(said.splitlines()) == 1
