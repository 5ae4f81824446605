"""Every file of ours that is damaged: one line that names it and says how to mend it, exit code 2, and nothing is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from helpers.command_line import run
from helpers.damage import Damage, cell, cut, empty, json_value, junk, last, nested, page, replaced, text, without
from helpers.files import tree
from helpers.run_directory import make_run
from helpers.small_datasets import scored

# --- datasets and tables of scores -----------------------------------------------------------------------------------

RANK, INSPECT, EXPORT = ["rank", "data"], ["data", "inspect", "data"], ["data", "export", "data", "--out", "e"]
SCORE, AGAIN = ["score", "data", "-r", "sharpness"], ["rank", "data", "choose=extremes", "k=2"]
GROUPS, IMAGES, SCORES = "data/groups.parquet", "data/images/part-00000.parquet", "data/scores/x.parquet"
DATA: list[tuple[str, Damage, list[str]]] = [
    *[(GROUPS, damage, command) for damage in (cut, empty, junk, page) for command in (INSPECT, SCORE, AGAIN)],
    *[(GROUPS, without(column), EXPORT) for column in ("prompt", "group_id", "prompt_id", "split", "preference")],
    *[(GROUPS, cell(column, None), EXPORT) for column in ("prompt", "group_id", "split")],
    *[(GROUPS, cell("metadata", value), EXPORT) for value in ("{", "[1]", "3")],
    (GROUPS, cell("preference", "best", all_rows=True), INSPECT),
    *[(IMAGES, damage, command) for damage in (cut, empty, junk) for command in (INSPECT, EXPORT)],
    *[(IMAGES, without(column), EXPORT) for column in ("index", "group_id", "image", "generator")],
    (IMAGES, cell("index", None), EXPORT),
    (IMAGES, cell("group_id", None), EXPORT),
    (IMAGES, cell("index", "first", all_rows=True), INSPECT),
    (IMAGES, page, EXPORT),
    *[(SCORES, damage, command) for damage in (cut, empty, junk, page) for command in (AGAIN, INSPECT)],
    *[(SCORES, without(column), AGAIN) for column in ("index", "group_id", "score")],
    (SCORES, cell("score", "high", all_rows=True), AGAIN),
    (SCORES, cell("group_id", None), AGAIN),
    *[("data/ranking.json", damage, RANK) for damage in (cut, empty, junk, nested)],
    *[("data/ranking.json", text(content), RANK) for content in ("{}", "[]", "3", '{"settings": 3, "report": {}}')],
    ("data/ranking.json", json_value("report", "dropped", value=...), INSPECT),
    *[("s.parquet", damage, [*SCORE, "-o", "s.parquet"]) for damage in (cut, empty, junk, page)],
    *[("s.parquet", cell("sharpness.identity", v), [*SCORE, "-o", "s.parquet"]) for v in ("{", "3", '{"reads": 3}')],
    *[("s.csv", junk, [*SCORE, "-o", "s.csv"]), ("s.jsonl", junk, [*SCORE, "-o", "s.jsonl"])],
    *[("s.csv", replaced('"{', f'"{broken}'), [*SCORE, "-o", "s.csv"]) for broken in ("", "[{")],
    ("s.csv", lambda path: path.write_text(path.read_text().rstrip() + ",more\n"), [*SCORE, "-o", "s.csv"]),  # type: ignore[list-item, return-value]
    ("s.csv", replaced("0.", "high."), [*SCORE, "-o", "s.csv"]),
    ("s.csv", lambda path: path.write_text(path.read_text() + "a,b" + ",c" * 40 + "\n"), [*SCORE, "-o", "s.csv"]),  # type: ignore[list-item, return-value]
    *[("s.jsonl", replaced('"reads"', broken), [*SCORE, "-o", "s.jsonl"]) for broken in ('"writes"', "reads")],
    ("s.jsonl", replaced('"sharpness": ', '"sharpness": "high", "z": '), [*SCORE, "-o", "s.jsonl"]),
    ("s.jsonl", replaced('"sharpness.identity": {', '"sharpness.identity": 3, "z": {'), [*SCORE, "-o", "s.jsonl"]),
]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ranked and scored dataset in data/, and three files of scores beside it."""
    at = tmp_path_factory.mktemp("damage")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(at)
        scored(at / "data", {"x": [[0.0, 1.0, 2.0], [1.0, 0.0, 0.5], [0.2, 0.1, 0.3]]})
        assert run(*RANK) == 0
        for ending in ("csv", "jsonl", "parquet"):
            assert run(*SCORE, "-o", f"s.{ending}") == 0
    return at


ADVICE = ("delete", "make", "again", "restore", "choose", "save", "once more", "not valid YAML")
MAY_CHANGE = ("r/config.yaml", "r/README.md", "data/.work/locks")  # what a resumed run writes first; locks


def refused(
    at: Path, file: str, command: list[str], capsys: pytest.CaptureFixture[str], advice: tuple[str, ...] = ADVICE
) -> str:
    """Run a command that must say which file is damaged and how to mend it, and change nothing."""
    before = {name: data for name, data in tree(at).items() if not name.startswith(MAY_CHANGE)}
    capsys.readouterr()
    code = run(*command)
    found = capsys.readouterr()
    assert code == 2, found.err + found.out
    assert {name: data for name, data in tree(at).items() if not name.startswith(MAY_CHANGE)} == before
    (line,) = found.err.splitlines()
    assert file in line and any(word in line for word in advice), line
    return line


@pytest.mark.parametrize(("file", "damage", "command"), DATA)
def test_damaged_data(
    file: str,
    damage: Damage,
    command: list[str],
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(dataset, tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a")
    damage(Path(file))
    refused(tmp_path / "a", file, command, capsys)


def test_an_image_without_bytes_costs_itself_alone(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(dataset, tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a")
    cell("image", None)(Path(IMAGES))
    assert run(*SCORE, "-o", "new.jsonl") == 3
    rows = [json.loads(line) for line in Path("new.jsonl").read_text().splitlines()]
    assert [bool(row["reason"]) for row in rows].count(True) == 1


def test_files_without_page_checksums_are_read(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As earlier versions wrote them."""
    shutil.copytree(dataset, tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a")
    for file in (GROUPS, IMAGES, SCORES):
        rows = pq.read_table(file)
        pq.write_table(rows, file)
    assert run(*AGAIN) == run(*INSPECT) == run(*EXPORT) == 0


# --- run directories -------------------------------------------------------------------------------------------------

REPORT = ["report", "r"]
RUN: list[tuple[str, Damage, list[str]]] = [
    *[("r/metrics.jsonl", damage, REPORT) for damage in (junk, text("[" * 5000 + "\n"))],
    *[("r/metrics.jsonl", replaced('"loss": 0', f'"loss": {value}, "x": 0'), REPORT) for value in ('"a"', "[1]", "{}")],
    *[("r/metrics.jsonl", replaced('{"step": 3,', wrong), REPORT) for wrong in ("3", "null\n{", '{"step": "3",', "[")],
    *[("r/eval.json", damage, REPORT) for damage in (cut, empty, junk, nested)],
    *[("r/eval.json", text(content), REPORT) for content in ("{}", "[1]", "3", '{"scores": 3}')],
    ("r/eval.json", json_value("scores", "geneval.dense", "all", value=3), REPORT),
    *[("r/eval.json", json_value(key, value=...), REPORT) for key in ("images", "prompts", "seeds", "scores")],
    *[("r/health.json", text(content), REPORT) for content in ("{", "", "3", "[3]", '[{"name": "a"}]', '{"a": 1}')],
    *[("r/validation.jsonl", text(f"{line}\n"), REPORT) for line in ("3", '{"step": 1}', '{"step": 1, "scores": 3}')],
    ("r/validation.jsonl", text('{"step": 1, "scores": {"a": ["b"]}}\n'), REPORT),
    *[("r/config.yaml", damage, REPORT) for damage in (junk, empty, text("a: [1"), text("- 3"))],
    *[("r/eval/scores.jsonl", text(f"{line}\n"), REPORT) for line in ("3", "{}", '{"index": [0, 0]}')],
    ("r/eval/images/tuned/00000-0.png", cut, REPORT),
    ("r/eval/images/base/00002-0.png", junk, REPORT),
]


@pytest.mark.parametrize(("file", "damage", "command"), RUN)
def test_damaged_run(
    file: str,
    damage: Damage,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("r"))
    assert run(*REPORT) == 0
    damage(Path(file))
    refused(tmp_path, file, command, capsys)


# --- what a run resumes from -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, sdxl_dir: Path) -> Path:
    """A run of six steps with a checkpoint every two, an average and a stored reference."""
    at = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(at)
        scored(at / "data", {"x": [[0.0, 1.0], [1.0, 0.0], [0.2, 0.1]]})
        config = {
            "run_dir": "r", "device": "cpu", "model": {"path": str(sdxl_dir)}, "tune": {"rank": 2},
            "data": {"path": "data", "resolution": 64}, "labels": {"source": "scores.x"},
            "train": {"steps": 4, "groups_per_step": 1, "threads": 1, "ema_decay": 0.5}, "tracking": {"trackers": []},
            "checkpoint": {"every": 2, "keep": 3}, "reference": {"store": "kept"}, "optimizer": {"schedule": "constant"},
        }  # fmt: skip
        (at / "c.yaml").write_text(json.dumps(config))
        assert run("train", "c.yaml") == 0
    return at


LATEST = "r/checkpoints/step-00000004"
STATE = f"{LATEST}/state.json"
RESUME, SAMPLE = ["train", "c.yaml", "train.steps=5"], ["eval", "r", "prompts=p.txt", "reward={name: sharpness}"]
OTHERS: list[tuple[str, Damage, list[str]]] = [
    *[(STATE, damage, RESUME) for damage in (cut, json_value("step", value=2))],
    *[(LATEST, lambda p: last(p / "policy.safetensors"), RESUME)],
    *[("r/metrics.jsonl", damage, RESUME) for damage in (junk, replaced('{"step": 2,', "null\n{"))],
    *[("kept/key.json", damage, RESUME) for damage in (cut, empty, text("[]"))],
    *[("kept/step-00000001-00000002-0.safetensors", damage, RESUME) for damage in (cut, empty, junk)],
    ("r/weights/pytorch_lora_weights.safetensors", cut, SAMPLE),
    ("r/weights/pytorch_lora_weights.safetensors", empty, SAMPLE),
    ("r/weights", shutil.rmtree, SAMPLE),
    *[("r/weights/pytorch_lora_weights.safetensors", damage, ["export", "r", "--out", "o"]) for damage in (cut, empty)],
    *[("r/config.yaml", damage, ["export", "r", "--out", "o"]) for damage in (junk, empty, text("- 3"))],
    *[(STATE, damage, [*SAMPLE, f"weights={LATEST}"]) for damage in (cut, text("{}"), json_value("config", value={}))],
    *[(LATEST, lambda p: last(p / "ema.safetensors"), [*SAMPLE, f"weights={LATEST}"])],
]


@pytest.mark.parametrize(("file", "damage", "command"), OTHERS)
def test_damage_around_a_run(
    file: str,
    damage: Damage,
    command: list[str],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(trained, tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a")
    Path("p.txt").write_text("a red cube\n")
    damage(Path(file))
    # Weights and configs of others are read in the same way, so the line cannot say which command made them.
    advice = ("cannot be read", "not", "missing", "once more") if file.startswith(("r/weights", "r/config")) else ADVICE
    refused(tmp_path / "a", LATEST if file == STATE else file, command, capsys, advice)
