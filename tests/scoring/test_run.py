"""`diffalign score`: every picture once, whatever is in the folder and whenever it is killed."""

from __future__ import annotations

import csv
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.rewards import load_reward
from diffalign.scoring.sources import Prompting
from diffalign.scoring.store import Store
from diffalign.stages.score import ScoreRequest, score
from helpers import pictures
from helpers.counting_reward import Counting, run
from helpers.files import json_lines
from helpers.page import Tags


class Newer(Counting):
    version = "2"


# --- hostile folders -------------------------------------------------------------------------------------------


def test_hostile_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = pictures.hostile(tmp_path / "in")
    out, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    evil = 'a "<script>alert(1)</script>" & more'
    code = score(ScoreRequest([str(tmp_path / "in")], ["sharpness"], prompt=evil, output=out, html=page))
    assert code == 3
    rows = {row["image"].removeprefix(f"{tmp_path.as_posix()}/in/"): row for row in json_lines(out)}
    assert set(rows) == good | set(bad)
    for name in good:
        assert rows[name]["reason"] == "" and rows[name]["sharpness"] is not None, name
    for name, word in bad.items():
        assert rows[name]["sharpness"] is None and word in rows[name]["reason"].lower(), rows[name]["reason"]
    html = page.read_text()
    assert "<img src=x" not in html and "<script>alert" not in html and "http" not in html.split("<body>")[1]
    data, script = Tags(html).scripts
    shown = json.loads(data)["images"]
    assert len(shown) == len(rows) and {image["prompt"] for image in shown} == {evil} and "alert" not in script
    assert "in/<img src=x onerror=alert(2)>.png" in {image["name"] for image in shown}
    assert "Traceback" not in capsys.readouterr().err


def test_pictures_are_seen_as_people_see_them(tmp_path: Path) -> None:
    pictures.hostile(tmp_path / "in")
    scores, _ = run([tmp_path / "in"], None, prompting=Prompting(one="x"))
    rows = {Path(row["image"]).name: row for row in scores.rows}
    # EXIF turns 96 x 64 to 64 x 96; the 16-bit picture is as bright as its 8-bit twin, not white; CMYK is not inverted.
    assert rows["plain.png"]["counting.width"] == 96 and rows["turned.jpg"]["counting.width"] == 64
    plain = rows["plain.png"]["counting"]
    for name in ("sixteen.png", "cmyk.jpg", "turned.jpg", "alpha.webp", "palette.png", "copy of plain.png"):
        assert rows[name]["counting"] == pytest.approx(plain, abs=3), name


def test_a_file_without_permission_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures.folder(tmp_path / "in", 3)
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "001.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    scores, _ = run([tmp_path / "in"], None)
    assert [row["reason"] for row in scores.rows] == ["", "Permission denied", ""]
    assert scores.failed == 1


def test_no_prompt_and_a_reward_that_refuses(tmp_path: Path) -> None:
    pictures.folder(tmp_path / "in", 4, ["fine", "odd", "fine too"])
    (tmp_path / "in" / "metadata.jsonl").write_text(
        "".join(
            json.dumps({"file_name": f"{i:03d}.png", "prompt": p}) + "\n"
            for i, p in enumerate(["fine", "odd one", "  "])
        )
    )
    scores, reward = run([tmp_path / "in"], tmp_path / "o.csv")
    assert [row["counting.reason"] for row in scores.rows] == ["", "odd prompt", "no prompt", "no prompt"]
    assert reward.seen == ["fine", "odd one"] and scores.failed == 3
    # What a reward refused is known; what had no prompt is tried again once it has one.
    (tmp_path / "in" / "003.txt").write_text("now it has one")
    again, reward = run([tmp_path / "in"], tmp_path / "o.csv")
    assert reward.seen == ["now it has one"] and again.failed == 2


# --- once, and only once ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_only_what_is_new_or_changed(tmp_path: Path, ending: str) -> None:
    pictures.folder(tmp_path / "in", 9, ["a cat", 'a "dog",\nrun'])
    out = tmp_path / f"o.{ending}"
    first, reward = run([tmp_path / "in"], out)
    assert len(reward.seen) == 9
    assert max(reward.batches) == 4
    assert set(reward.seen[:4]) == {"a cat", 'a "dog",\nrun'}
    before = out.read_bytes()
    same, reward = run([tmp_path / "in"], out)
    assert not reward.seen
    assert out.read_bytes() == before
    assert same.known == 9
    assert [r["counting"] for r in same.rows] == pytest.approx([r["counting"] for r in first.rows])
    pictures.smooth(7).save(tmp_path / "in" / "004.png")  # changed
    pictures.smooth(8).save(tmp_path / "in" / "zz.png")  # new
    (tmp_path / "in" / "zz.txt").write_text("a new one")
    (tmp_path / "in" / "002.png").unlink()  # gone, but metadata.jsonl still names it
    changed, reward = run([tmp_path / "in"], out)
    assert len(reward.seen) == 2
    assert len(changed.rows) == 10
    assert changed.rows[2]["reason"] == "No such file or directory"
    _, reward = run([tmp_path / "in"], out, Newer())
    assert len(reward.seen) == 9


def test_copies_are_scored_once_and_prompts_count(tmp_path: Path) -> None:
    pictures.folder(tmp_path / "in", 1)
    for i in range(1, 5):
        shutil.copy(tmp_path / "in" / "000.png", tmp_path / "in" / f"{i:03d}.png")
    prompts = ["a", "a", "b", "a", "b"]
    rows = [{"file_name": f"{i:03d}.png", "prompt": p} for i, p in enumerate(prompts)]
    (tmp_path / "in" / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    scores, reward = run([tmp_path / "in"], None)
    assert sorted(reward.seen) == ["a", "b"] and len(scores.rows) == 5
    assert all(row["counting"] == scores.rows[0]["counting"] for row in scores.rows)


def test_stopped_runs_go_on(tmp_path: Path) -> None:
    pictures.folder(tmp_path / "in", 14)
    out = tmp_path / "o.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run([tmp_path / "in"], out, Counting(stop_after=2))
    assert not out.exists()
    journal = tmp_path / "o.jsonl.journal" / "0.jsonl"
    assert len(journal.read_text().splitlines()) == 8
    journal.write_bytes(journal.read_bytes()[:-20])  # killed in the middle of a line
    _, reward = run([tmp_path / "in"], out)
    assert len(reward.seen) == 14 - 7
    assert len(json_lines(out)) == 14 and not journal.parent.exists()
    straight, _ = run([tmp_path / "in"], tmp_path / "straight.jsonl")
    assert out.read_bytes() == (tmp_path / "straight.jsonl").read_bytes() and straight.failed == 0


def test_a_run_on_other_pictures_keeps_the_journal(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pictures.folder(tmp_path / name, 9, [f"prompt of {name}"])
    out = tmp_path / "o.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run([tmp_path / "a"], out, Counting(stop_after=2))
    run([tmp_path / "b"], out)
    _, reward = run([tmp_path / "a"], out)
    assert len(reward.seen) == 1
    assert len(json_lines(out)) == 18
    assert not (tmp_path / "o.jsonl.journal").exists()


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_kill_while_the_output_is_written(
    tmp_path: Path, ending: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """before: the new file is complete but not in place. between: in place, the journal still there. after: half deleted."""
    pictures.folder(tmp_path / "in", 9)
    out = tmp_path / f"o.{ending}"
    run([tmp_path / "in"], out)
    straight = out.read_bytes()
    out.unlink()
    with monkeypatch.context() as patched:
        remove = shutil.rmtree

        def killed(path: Path, *rest: Any, **options: Any) -> Any:
            if moment == "after":
                remove(path, *rest, **options)
                Path(path).mkdir()
            raise KeyboardInterrupt

        patched.setattr("pathlib.Path.replace" if moment == "before" else "shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run([tmp_path / "in"], out)
    assert out.exists() == (moment != "before")
    _, reward = run([tmp_path / "in"], out)
    assert not reward.seen and out.read_bytes() == straight
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", out.name]


KILLED = """
import os, signal, sys
from helpers.counting_reward import Counting, run
from helpers.page import Tags
from pathlib import Path
class Deadly(Counting):
    def measure(self, *a, **k):
        if len(self.batches) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().measure(*a, **k)
run([Path(sys.argv[1])], Path(sys.argv[2]), Deadly())
"""


def test_killed_runs_go_on(tmp_path: Path) -> None:
    pictures.folder(tmp_path / "in", 12)
    out = tmp_path / "o.parquet"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "in"), str(out)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL and not out.exists()
    _, reward = run([tmp_path / "in"], out)
    assert len(reward.seen) == 4 and pq.read_table(out).num_rows == 12


def test_earlier_columns_and_other_sources_stay(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pictures.folder(tmp_path / name, 3)
    out = tmp_path / "o.csv"
    run([tmp_path / "a"], out)
    code = score(ScoreRequest([str(tmp_path / "b")], ["sharpness"], output=out))
    assert code == 0
    score(ScoreRequest([str(tmp_path / "a")], ["sharpness"], output=out))
    _, reward = run([tmp_path / "a"], out)
    assert not reward.seen  # its scores survived two runs that did not ask for them
    with out.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 6 and all(row["sharpness"] for row in rows)
    assert [bool(row["counting"]) for row in rows] == [True] * 3 + [False] * 3


def test_a_foreign_output_is_not_overwritten(tmp_path: Path) -> None:
    pictures.folder(tmp_path / "in", 1)
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DiffalignError, match="not a file of `diffalign score`"):
        run([tmp_path / "in"], tmp_path / "mine.csv")
    assert (tmp_path / "mine.csv").read_text() == "a,b\n1,2\n"
    with pytest.raises(DiffalignError, match=r"o\.txt: unknown suffix"):
        Store(tmp_path / "o.txt")


def test_rows_say_what_made_them(tmp_path: Path) -> None:
    pictures.folder(tmp_path / "in", 1)
    out = tmp_path / "o.jsonl"
    score(ScoreRequest([str(tmp_path / "in")], ["j=jpeg_compressibility:quality=50"], output=out))
    (row,) = json_lines(out)
    assert len(row["sha256"]) == 64 and row["prompt"] == "a cat"
    identity = row["j.identity"]
    assert identity["reward"] == "jpeg_compressibility" and identity["options"] == {"quality": 50, "sign": 1}
    assert {"version", "weights", "preprocessing"} <= set(identity)


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    """`accelerate launch`, whose --multi_gpu starts processes on a machine without GPUs, too."""
    pictures.folder(tmp_path / "in", 11)
    out = tmp_path / "o.jsonl"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    verb = ["-m", "diffalign", "score", str(tmp_path / "in"), "-r", "sharpness", "-o", str(out), "--device", "cpu"]
    done = subprocess.run(
        [*launch, "--main_process_port", port, *verb],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("11 scores new") == 1
    alone = load_reward("sharpness").score([Image.open(p) for p in sorted((tmp_path / "in").glob("*.png"))], [""] * 11)
    assert [row["sharpness"] for row in json_lines(out)] == alone.tolist()


@pytest.mark.parametrize("kept", [False, True])
def test_freed_memory_is_used_again(kept: bool) -> None:
    """Page faults of ten blocks of 40 MB, one after the other: none where the first one's memory is kept."""
    code = (
        "import resource, numpy as np\n"
        "from diffalign.scoring.allocator import keep_freed_memory\n"
        f"keep_freed_memory() if {kept} else None\n"
        "for _ in range(10): np.ones(5_000_000)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10): np.ones(5_000_000)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    faults = int(done.stdout)
    assert faults < 100 if kept or platform.libc_ver()[0] != "glibc" else faults > 100


# --- one odd picture costs one row -----------------------------------------------------------------------------


class Picky(Counting):
    """Fails on pictures of some widths, in `measure` or already in `prepare`; 0 fails on all."""

    def __init__(self, *widths: int, early: bool = False, error: type[Exception] = ValueError) -> None:
        super().__init__()
        self.widths, self.early, self.error = widths, early, error

    def _check(self, image: Image.Image) -> None:
        if image.width in self.widths or 0 in self.widths:
            raise self.error(f"absolute aspect ratio must be smaller than 200\nwidth {image.width}")

    def prepare(self, image: Image.Image) -> Image.Image:
        if self.early:
            self._check(image)
        return image

    def measure(self, images: list[Image.Image], prompts: list[str], metadata: Any = None) -> dict[str, Any]:
        for image in images:
            self._check(image)
        return super().measure(images, prompts, metadata)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("error", [ValueError, RuntimeError, ZeroDivisionError, IndexError])
def test_a_picture_on_which_a_reward_fails_is_one_row(tmp_path: Path, early: bool, error: type[Exception]) -> None:
    pictures.folder(tmp_path / "in", 11)
    for name in ("002.png", "005.png"):
        pictures.smooth(1, 30, 30).save(tmp_path / "in" / name)
    output = tmp_path / "o.jsonl"
    scores, _ = run([tmp_path / "in"], output, Picky(30, early=early, error=error))
    reasons = {Path(row["image"]).name: row["counting.reason"] for row in scores.rows}
    wanted = f"{error.__name__}: absolute aspect ratio must be smaller than 200"
    assert {name: reason for name, reason in reasons.items() if reason} == {"002.png": wanted, "005.png": wanted}
    assert scores.failed == 2 and scores.computed == 9
    assert all(row["reason"] == "" for row in scores.rows)  # another reward may take the same picture
    # The next run tries them again and knows the others.
    again, _ = run([tmp_path / "in"], output, Picky(early=early))
    assert again.known == 9 and again.failed == 0


def test_a_reward_that_fails_on_everything_ends_the_run(tmp_path: Path) -> None:
    pictures.folder(tmp_path / "in", 6)
    with pytest.raises(ValueError, match="smaller than 200"):
        run([tmp_path / "in"], None, Picky(0))
    pictures.folder(tmp_path / "few", 3)
    assert run([tmp_path / "few"], None, Picky(0))[0].failed == 3


@pytest.mark.parametrize("error", [ImportError, DiffalignError])
def test_errors_that_no_picture_causes_are_raised(tmp_path: Path, error: type[Exception]) -> None:
    pictures.folder(tmp_path / "in", 3)
    with pytest.raises(error):
        run([tmp_path / "in"], None, Picky(48, error=error))


@pytest.mark.parametrize(
    ("pattern", "gone"),
    [
        ("in/*.png", "0.png"),
        ("in/[01].png", "1.png"),
        ("**/?.png", "0.png"),
        ("i*", "2.png"),
        ("in/sub*/*.png", "sub/3.png"),
    ],
)
def test_images_of_a_glob_that_were_deleted_leave_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, gone: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("in/sub", "other"):
        (tmp_path / place).mkdir(parents=True)
    for n, name in enumerate(("in/0.png", "in/1.png", "in/2.png", "in/sub/3.png", "in/sub/4.png", "other/00.png")):
        pictures.smooth(n).save(tmp_path / name)
    out = tmp_path / "o.jsonl"

    def scored(*sources: str) -> set[str]:
        assert score(ScoreRequest(list(sources), ["sharpness"], output=out)) == 0
        return {json.loads(line)["image"] for line in out.read_text().splitlines()}

    everything = scored("in", "other")
    assert scored(pattern) == everything  # other sources keep their rows
    (tmp_path / "in" / gone).unlink()
    assert scored(pattern) == everything - {f"in/{gone}"}
    (tmp_path / "other" / "00.png").unlink()
    assert scored("in") == everything - {f"in/{gone}"}  # gone, but nobody asked for it
    (tmp_path / "[x].png").write_bytes((tmp_path / "in" / "sub" / "4.png").read_bytes())
    pictures.smooth(9).save(tmp_path / "x.png")
    assert {"[x].png", "x.png"} <= scored("[x].png", "x.png")
    (tmp_path / "x.png").unlink()
    assert {"[x].png", "x.png"} <= scored("[x].png")  # a file that is there is no pattern
