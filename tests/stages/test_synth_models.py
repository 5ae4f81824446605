"""`diffalign synth` with genuine models and rewards: killed at any moment, or shared by two processes, the same bytes.

Short: two tiny pipelines with random weights. Long (`soak`): the two models of the embedded world and 20 kills.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from diffalign.config import load_synth_config
from diffalign.data.dataset import PreferenceDataset
from diffalign.stages import synth
from helpers.files import tree
from helpers.processes import in_a_child

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "green") for shape in ("square", "circle", "star")]


@pytest.fixture
def make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soak: bool, request: pytest.FixtureRequest
) -> Callable[[str], Path]:
    """make(folder): a whole run into tmp_path/folder, in this process."""
    monkeypatch.setattr("diffalign.data.plan.IMAGES_PER_SHARD", 8)
    one, two = ("shapes-sdxl", "shapes-sd3") if soak else map(request.getfixturevalue, ("sdxl_dir", "sd3_dir"))
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    (tmp_path / "config.yaml").write_text(
        f"device: cpu\nthreads: 1\nlatents: true\nprompts: {{source: {tmp_path / 'prompts.txt'}}}\ngenerators:\n"
        f"- {{name: one, model: {{path: '{one}'}}, images_per_prompt: 2, batch_size: 4, steps: 2, height: 64, width: 64}}\n"
        f"- {{name: two, model: {{path: '{two}'}}, images_per_prompt: 1, batch_size: 4, steps: 2, height: 64, width: 64}}\n"
        "rewards: [{name: sharpness, detector: null}, {name: jpeg_compressibility, detector: null}]\ncontact_sheet: 3\n"
    )

    def run(folder: str) -> Path:
        out = tmp_path / folder / "data"
        synth.synth(load_synth_config(tmp_path / "config.yaml", [f"out={out}"]))
        return out

    return run


@pytest.mark.soak
def test_killed_at_any_moment(make: Callable[[str], Path], tmp_path: Path, soak: bool) -> None:
    start = time.monotonic()
    out = make("whole")
    whole, lasted = tree(out), time.monotonic() - start
    dataset = PreferenceDataset(out)
    assert len(dataset) == 6 and len(dataset.image_index) == 18 and all(dataset.column("preference"))
    chance, kills, wholes = random.Random(0), 0, 0
    while kills < (20 if soak else 3):
        fresh = not (tmp_path / "cut").exists()
        child, began, moment = in_a_child(lambda: make("cut")), time.monotonic(), chance.uniform(0, lasted)
        while not (done := os.waitpid(child, os.WNOHANG)[0]) and time.monotonic() - began < moment:
            time.sleep(0.01)
        if done:  # it got through, so that the next kill hits a run from its beginning
            lasted = time.monotonic() - began if fresh else lasted  # on a machine with other work
            assert tree(tmp_path / "cut" / "data") == whole
            shutil.rmtree(tmp_path / "cut")
            wholes += 1
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
    assert tree(make("cut")) == whole
    print(f"{kills} kills over {wholes + 1} runs that ended, all with the same bytes")


def test_two_processes_give_the_bytes_of_one(make: Callable[[str], Path], tmp_path: Path) -> None:
    whole = tree(make("whole"))
    children = [in_a_child(lambda: make("shared")) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert tree(tmp_path / "shared" / "data") == whole
