"""One writer at a time: the second command is refused in one line that names the first, before it changes anything."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.files import lock
from diffalign.files.lock import LOCK_FILE, try_lock, writing_file, writing_folder
from helpers.command_line import run
from helpers.files import tree
from helpers.processes import environment, in_a_child
from helpers.small_datasets import group_rows, scored, write_groups, write_images

HOLD = (
    "import sys, time, pathlib; from diffalign.files.lock import writing_folder\n"
    "with writing_folder(pathlib.Path(sys.argv[1]), 'out', shared=sys.argv[2] == 'shared'):\n"
    "    pathlib.Path(sys.argv[3]).touch(); time.sleep(60)\n"
)


def holder(folder: Path, mode: str, ready: Path) -> subprocess.Popen[bytes]:
    """Start a process that holds a folder's lock, and wait until it does."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), mode, str(ready)], env=environment())
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.01)
    return process


# --- the lock itself -------------------------------------------------------------------------------------------------


def test_the_second_is_refused_and_a_killed_holder_never_blocks(tmp_path: Path) -> None:
    process = holder(tmp_path / "run", "alone", tmp_path / "ready")
    wanted = rf"^run_dir .*run is in use by pid {process.pid} on {socket.gethostname()} since 20..-..-.. .*; wait until"
    with pytest.raises(DiffalignError, match=wanted), writing_folder(tmp_path / "run", "run_dir"):
        pass
    with pytest.raises(DiffalignError, match=f"pid {process.pid}"), writing_folder(tmp_path / "run", "o", shared=True):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run" / LOCK_FILE).is_file()  # it is left, and means nothing
    with writing_folder(tmp_path / "run", "run_dir"):
        held = json.loads((tmp_path / "run" / LOCK_FILE).read_text())
        assert held["pid"] == os.getpid()
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_shared_locks_exclude_only_those_that_are_not(tmp_path: Path) -> None:
    first = holder(tmp_path, "shared", tmp_path / "ready")
    with writing_folder(tmp_path, "out", shared=True):
        first.kill()
        first.wait()
        # The first holder is dead, so the living one is named.
        assert in_a_child(lambda: _refused(tmp_path, f"pid {os.getppid()} ")) and os.wait()[1] == 0
    with writing_folder(tmp_path, "out"):
        pass
    assert not (tmp_path / LOCK_FILE).exists()


def _refused(folder: Path, named: str) -> None:
    with pytest.raises(DiffalignError, match=named), writing_folder(folder, "out"):
        pass


def test_many_take_turns(tmp_path: Path) -> None:
    """The lock's file is deleted by each holder: no two may hold it, at the old file and at a new one."""

    def count() -> None:
        for _ in range(20):
            while True:
                try:
                    with writing_file(tmp_path / "n", "--output"):
                        value = int((tmp_path / "n").read_text())
                        time.sleep(0.001)
                        (tmp_path / "n").write_text(str(value + 1))
                    break
                except DiffalignError:
                    continue

    (tmp_path / "n").write_text("0")
    children = [in_a_child(count) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3
    assert (tmp_path / "n").read_text() == "60"


def test_what_is_made_for_a_refused_command_is_removed(tmp_path: Path) -> None:
    for target in (writing_folder(tmp_path / "a/b", "out"), writing_file(tmp_path / "c/d.csv", "out")):
        with pytest.raises(ValueError, match="refused"), target:
            raise ValueError("refused")
    assert not list(tmp_path.iterdir())


def test_other_processes_of_a_launch_hold_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with writing_folder(tmp_path, "out"):
        monkeypatch.setenv("RANK", "3")
        with writing_folder(tmp_path, "out"):
            pass
        monkeypatch.setenv("RANK", "0")
        _refused(tmp_path, "in use")


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """A dataset of somebody else may hold a link named like the lock."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / LOCK_FILE).symlink_to(tmp_path / "precious")
    _refused(tmp_path / "data", "cannot be written")
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("folder", ["/proc/x", "/dev/null/x", "file/x", "a" * 300])
def test_a_folder_that_cannot_be_made(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    _refused(tmp_path / folder, r"out .* cannot be written \(.+\); choose another one")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_called_that(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another place, which the refusal of a folder suggests, would be no better on the same disk."""

    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "data").mkdir()
    monkeypatch.setattr(os, "open", full)
    for target in (writing_folder(tmp_path / "data", "out"), writing_file(tmp_path / "s.csv", "out")):
        with pytest.raises(OSError, match=os.strerror(number)) as raised, target:
            pass
        assert raised.value.errno == number


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(handle: int, mode: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr(lock, "_said", set())
    with writing_folder(tmp_path, "out"), try_lock(tmp_path / "task") as free:
        assert free
    assert capsys.readouterr().err.count("this file system has no locks") == 1


def test_values_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/diffalign/__main__.py", "train", "base.yaml", "model.token=hf_secret"])
    with writing_folder(tmp_path, "out"):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["command"] == "diffalign train base.yaml"


# --- every verb that writes ------------------------------------------------------------------------------------------


def _folder(name: str) -> Callable[[Path], AbstractContextManager[None]]:
    return lambda at: writing_folder(at / name, "out")


def _file(name: str) -> Callable[[Path], AbstractContextManager[None]]:
    return lambda at: writing_file(at / name, "--output")


VERBS: dict[str, tuple[Callable[[Path], AbstractContextManager[None]], list[str]]] = {
    "train": (_folder("o"), ["train", "shapes_sd3_dpo", "run_dir=o", "data.path=data"]),
    "distill": (_folder("o"), ["distill", "shapes_sd3_gndm", "run_dir=o"]),
    "reward-gradient": (_folder("o"), ["reward-gradient", "shapes_sd3_reward_gradient", "run_dir=o"]),
    "judge": (_folder("o"), ["judge", "shapes_judge_gdso", "run_dir=o"]),
    "sample": (_folder("o"), ["sample", "sample.yaml", "out=o"]),
    "synth": (_folder("o"), ["synth", "synth_shapes", "out=o"]),
    "rank": (_folder("data"), ["rank", "data"]),
    "score": (_file("s.jsonl"), ["score", "data", "-r", "sharpness", "-o", "s.jsonl"]),
    "score csv": (_file("deep/s.csv"), ["score", "data", "-r", "sharpness", "-o", "deep/s.csv"]),
    "into-dataset": (_folder("data"), ["score", "data", "-r", "sharpness", "--into-dataset"]),
    "pairs": (_folder("o"), ["pairs", "pairs.csv", "--out", "o"]),
    "convert": (_folder("o"), ["data", "convert", "data", "--out", "o"]),
    "data export": (_folder("o"), ["data", "export", "data", "--out", "o"]),
    "export": (_folder("o"), ["export", "data", "--out", "o"]),
    "eval": (_folder("o"), ["eval", "eval.yaml", "out=o"]),
    "rounds": (_folder("o"), ["rounds", "rounds_shapes_gdro", "out=o"]),
    "quickstart": (_folder("o"), ["testbed", "quickstart", "--out", "o"]),
    "judge-data": (_folder("o"), ["testbed", "judge-data", "o"]),
    "judge-base": (_folder("o"), ["testbed", "judge-base", "student", "o"]),
    "pretrain": (_file("o/shapes-sd3"), ["testbed", "pretrain", "shapes-sd3", "--out", "o"]),
    "judge-distributions": (_file("d.jsonl"), ["judge-distributions", "j", "pairs.jsonl", "--out", "d.jsonl"]),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_what_another_is_writing(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scored(tmp_path / "data", {"x": [[0.0, 1.0], [1.0, 0.0]]})
    model = "model: {path: shapes-sd3}\nprompts: p.txt\n"
    (tmp_path / "sample.yaml").write_text(model)
    (tmp_path / "eval.yaml").write_text(model + "weights: w\nreward: {name: sharpness}\n")
    (tmp_path / "p.txt").write_text("a red cube\n")
    lock_of, arguments = VERBS[verb]
    with lock_of(Path()):
        before = tree(tmp_path)
        assert run(*arguments) == 2
        assert tree(tmp_path) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert f"is in use by pid {os.getpid()} on " in line


# --- two real processes ----------------------------------------------------------------------------------------------

SCORING = """
import os, sys, time
import diffalign.rewards.pixel_rewards as pixels
from diffalign.cli import app
measure = pixels.Sharpness.measure
def slow(self, images, *rest, **named):
    open("begun", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.01)
    return measure(self, images, *rest, **named)
pixels.Sharpness.measure = slow
app(sys.argv[1:], prog_name="diffalign")
"""


def test_two_scorings_into_one_file_lose_nothing(tmp_path: Path) -> None:
    """Two processes, other images and other rewards: the second is refused, and the same command afterwards adds to it."""
    for n in range(24):
        pixels = np.random.default_rng(n).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        (tmp_path / ("a" if n < 16 else "b")).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / ("a" if n < 16 else "b") / f"{n}.png")
    first = ["score", "a", "-r", "sharpness", "-o", "s.jsonl", "--batch-size", "4"]
    second = ["score", "b", "-r", "sharpness", "-r", "jpeg_compressibility", "-o", "s.jsonl"]

    def start(arguments: list[str]) -> subprocess.Popen[str]:
        line = [sys.executable, "-c", SCORING, *arguments]
        return subprocess.Popen(
            line, env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    one = start(first)
    while not (tmp_path / "begun").exists():
        assert one.poll() is None
        time.sleep(0.01)
    two = start(second)
    refusal = two.communicate()[1]
    assert two.returncode == 2 and one.poll() is None
    assert f"s.jsonl is in use by pid {one.pid} on " in refusal and len(refusal.splitlines()) == 1
    (tmp_path / "go").touch()
    assert one.wait() == 0
    assert start(second).wait() == 0
    rows: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and all(row["sharpness"] is not None for row in rows)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.timeout(20)
def test_a_place_where_no_file_can_be_made_is_refused() -> None:
    """Not waited for: it looks like a folder that another process deletes again and again."""
    with pytest.raises(DiffalignError, match="--out /proc/x cannot be written"), writing_file(Path("/proc/x"), "--out"):
        pass


def test_two_processes_of_one_command_share_a_dataset(tmp_path: Path) -> None:
    """`synth` and `sample` divide their work; a command that replaces labels waits until they have ended."""
    write_images(tmp_path / "data")
    write_groups(tmp_path / "data", group_rows())
    process = holder(tmp_path / "data", "shared", tmp_path / "ready")
    try:
        with writing_folder(tmp_path / "data", "out", shared=True):
            assert run("rank", tmp_path / "data") == 2
    finally:
        process.kill()
        process.wait()
