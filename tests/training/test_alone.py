"""What one process does alone may take longer than a collective may wait: the others look at a file meanwhile."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from diffalign.errors import DiffalignError
from diffalign.training import alone
from diffalign.training.alone import Alone
from diffalign.training.device import LIMIT
from helpers.files import rows
from helpers.processes import finish, torchrun
from helpers.small_datasets import group_rows, write_groups, write_images

SHORT = """
import os, sys, time
from datetime import timedelta
import torch.distributed as dist
start = dist.init_process_group
dist.init_process_group = lambda *given, **named: start(*given, **{**named, "timeout": timedelta(seconds=5)})
MAIN = os.environ["RANK"] == "0"
def slow(action):
    def slowed(*given, **named):
        if MAIN:
            time.sleep(7)
        return action(*given, **named)
    return slowed
"""
RUN = """
from pathlib import Path
from diffalign.training import run
from helpers import toy, toy_run
toy_run.Weighed.run = slow(toy_run.Weighed.run)
toy.ToyBackbone.save_weights = slow(toy.ToyBackbone.save_weights)
run.save_checkpoint = slow(run.save_checkpoint)
config = toy.toy_config(
    Path(sys.argv[1]), train={"steps": 2, "groups_per_step": 4, "micro_batch": 2, "threads": 1},
    validation={"every": 5, "prompts": "p.txt"}, checkpoint={"every": 2},
)
backbone = toy.ToyBackbone()
watch = toy_run.Weighed(backbone, config.validation, [], {}, {}, 8)
toy.train(config, backbone=backbone, source=toy.ToySource(), validation=watch)
"""
ENCODE = """
import json
from diffalign.config import TrainConfig
from diffalign.data import latents
from diffalign.stages.train import train
group = latents.Encoder.group
def late(self, row):
    with open(sys.argv[2], "a") as log:
        log.write(f"{row} {os.environ['RANK']}\\n")
    time.sleep(7 if row == 1 else 0.5)
    return group(self, row)
latents.Encoder.group = late
train(TrainConfig.model_validate(json.loads(sys.argv[1])))
"""


def program(tmp_path: Path, text: str) -> str:
    path = tmp_path / "program.py"
    path.write_text(SHORT + text)
    return str(path)


def test_validation_checkpoint_and_weights_may_take_long(tmp_path: Path) -> None:
    finish([*torchrun(), program(tmp_path, RUN), str(tmp_path / "run")])
    assert len(rows(tmp_path / "run")) == 2 and load_file(tmp_path / "run/weights/weights.safetensors")
    assert not list((tmp_path / "run").glob(".*"))


def test_encoding_is_shared_and_may_take_long(tmp_path: Path, sdxl_dir: Path) -> None:
    """Through `diffalign train` in two processes: each group is encoded by one of them."""
    write_images(tmp_path / "data")
    write_groups(tmp_path / "data", group_rows())
    config = {
        "run_dir": str(tmp_path / "run"), "device": "cpu", "model": {"path": str(sdxl_dir)}, "tune": {"rank": 2},
        "data": {"path": str(tmp_path / "data"), "resolution": 64}, "tracking": {"trackers": []},
        "train": {"steps": 1, "groups_per_step": 2, "micro_batch": 1, "threads": 1},
    }  # fmt: skip
    finish([*torchrun(), program(tmp_path, ENCODE), json.dumps(config), str(tmp_path / "log")])
    assert len(rows(tmp_path / "run")) == 1
    assert sorted(line.split()[0] for line in (tmp_path / "log").read_text().splitlines()) == ["0", "1", "2"]
    assert not list((tmp_path / "data/cache").rglob("*.part"))


# --- the file, without processes -------------------------------------------------------------------------------------


def two(folder: Path, monkeypatch: pytest.MonkeyPatch, shared: bool = True) -> list[Alone]:
    """Both processes of a launch; collectives are replaced, and waits in them are counted."""
    monkeypatch.setattr(alone, "broadcast_object_list", lambda given: ["launch"])
    monkeypatch.setattr(alone, "gather_object", lambda given: [*given, shared])
    monkeypatch.setattr(alone.uuid, "uuid4", lambda: SimpleNamespace(hex="launch"))
    found: list[Any] = []
    for main in (True, False):
        accelerator = SimpleNamespace(num_processes=2, is_main_process=main, waits=0)
        accelerator.wait_for_everyone = lambda a=accelerator: setattr(a, "waits", a.waits + 1)
        found.append(Alone(accelerator, folder))  # type: ignore[arg-type]
    return found


def test_the_others_wait_until_the_main_process_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".alone-killed").write_text("9")
    main, other = two(tmp_path, monkeypatch)
    assert [p.name for p in tmp_path.iterdir()] == [".alone-launch"]
    seen: list[str] = []

    def wait() -> None:
        with other.main_alone():
            seen.append("in")
        seen.append("out")

    waiting = threading.Thread(target=wait)
    with main.main_alone():
        waiting.start()
        waiting.join(0.5)
        assert seen == ["in"]
    waiting.join(10)
    assert seen == ["in", "out"]
    main.close()
    assert not list(tmp_path.iterdir())


def test_a_main_process_that_fails_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, other = two(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="disk"), main.main_alone():
        raise ValueError("disk")
    with pytest.raises(DiffalignError, match="main process failed"), other.main_alone():
        pass


def test_without_a_shared_disk_a_collective_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, other = two(tmp_path, monkeypatch, shared=False)
    for one in (main, other):
        with one.main_alone():
            pass
        assert one.accelerator.waits == 1  # type: ignore[attr-defined]
    assert LIMIT.days == 7


def test_one_process_writes_nothing(tmp_path: Path) -> None:
    single = Alone(SimpleNamespace(num_processes=1, is_main_process=True, wait_for_everyone=lambda: None), tmp_path)  # type: ignore[arg-type]
    with single.main_alone():
        pass
    single.close()
    assert not list(tmp_path.iterdir())
