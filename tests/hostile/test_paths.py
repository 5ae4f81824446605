"""Names from data never write outside the target, and neither names nor links read outside the folder."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.config import load
from diffalign.data.convert import import_pairs, open_rows
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.dataset_export import export
from diffalign.data.imported import write_imported
from diffalign.data.labels import raw_labels
from diffalign.data.prompts import read_prompts
from diffalign.data.writer import ImageWriter, write_groups
from diffalign.errors import DiffalignError
from diffalign.files.paths import FOLLOW_LINKS, inside, is_plain_name, leads_out, member_name
from diffalign.scoring.sources import collect
from diffalign.stages.score import ScoreRequest, score
from helpers import pictures
from helpers.command_line import run
from helpers.files import tree

SPLITS = [
    "../../evil",
    "/tmp/evil",
    "a/b",
    "..",
    "",
    "a\nb",
    "a\x1b[2J",
    "a\0b",
    "x" * 300,
    "a\\b",
    "-\u202eb",
    " a",
    "*",
]
IDS = [
    "../../evil",
    "/tmp/evil2",
    "a\nb",
    "a\x1bb",
    "..",
    "",
    ".",
    "a.b.c",
    "ß/ü",
    "x" * 5000,
    "%2E",
    "a\0b",
    "CON",
    "\ud800",
]


def dataset(folder: Path, split: str = "train", ids: tuple[str, ...] = ("g",)) -> PreferenceDataset:
    """Write groups of two images each."""
    with ImageWriter(folder) as writer:
        for group in ids:
            for k in range(2):
                writer.write(group, k, pictures.smooth(k), "m", k, {})
    rows = [
        {
            "group_id": group,
            "prompt_id": "p",
            "prompt": "a cat",
            "preference": [1.0, 0.0],
            "split": split,
            "metadata": {},
        }
        for group in ids
    ]
    write_groups(folder, rows)
    return PreferenceDataset(folder)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("form", ["rows", "pickapic", "webdataset"])
def test_export_writes_only_below_its_folder(tmp_path: Path, split: str, form: str) -> None:
    made = dataset(tmp_path / "in" / "deep" / "data", split)
    before = tree(tmp_path)
    with pytest.raises(DiffalignError, match="is no plain name"):
        export(made, tmp_path / "in" / "out", form)
    assert tree(tmp_path) == before


def test_ordinary_splits_are_exported(tmp_path: Path) -> None:
    for split in ("train", "validation.1", "größe 2", "a-b_c", "2024+x"):
        export(dataset(tmp_path / split, split), tmp_path / "out" / split, "rows")
        assert (tmp_path / "out" / split / "data" / f"{split}-00000-of-00001.parquet").is_file()


def test_members_of_a_tar_are_plain_names(tmp_path: Path) -> None:
    ids = tuple(group for group in IDS if group != "\ud800")  # a parquet file holds no lone surrogate
    export(dataset(tmp_path / "data", ids=ids), tmp_path / "out", "webdataset")
    with tarfile.open(next((tmp_path / "out").rglob("*.tar"))) as tar:
        names = tar.getnames()
        records = [json.load(tar.extractfile(n)) for n in names if n.endswith(".json")]  # type: ignore[arg-type]
    assert [record["group_id"] for record in records] == list(ids)
    assert len(set(names)) == len(names) == 3 * len(ids)
    for name in names:
        key, _, rest = name.partition(".")
        assert (
            key
            and set(key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-%")
            and len(key) <= 130
        )
        assert rest in ("json", "0.png", "1.png")
    copied = write_imported(open_rows([tmp_path / "out"], None)[1], tmp_path / "back")
    assert copied.groups == len(ids)


def test_names_of_members_differ_where_texts_do() -> None:
    assert len({member_name(text) for text in IDS}) == len(IDS)
    assert member_name("000001-ab12") == "000001-ab12"
    assert member_name("x" * 200) != member_name("x" * 201)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a\0b", "", "..", "./../x", "a/b/../../../x"])
def test_names_that_lead_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(DiffalignError, match="leaves its folder"):
        inside(tmp_path, name)


@pytest.mark.parametrize("source", ["scores./abs/x", "scores.../x", "scores.a/b"])
def test_scores_lie_in_the_dataset(tmp_path: Path, source: str) -> None:
    made = dataset(tmp_path / "data")
    for place in ("abs", "data/scores/a"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "x.parquet").write_bytes(b"")
        (tmp_path / place / "b.parquet").write_bytes(b"")
    with pytest.raises(DiffalignError, match="has no scores of"):
        raw_labels(made, [0], source.replace("/abs", str(tmp_path / "abs")))


@pytest.mark.parametrize("split", SPLITS[:-1])
def test_names_of_splits_that_the_user_gives(tmp_path: Path, split: str, capsys: pytest.CaptureFixture[str]) -> None:
    dataset(tmp_path / "data")
    given = json.dumps({split: 0.5})
    assert run("rank", tmp_path / "data", f"splits={given}") == 2
    assert "is no plain name" in capsys.readouterr().err
    with pytest.raises(DiffalignError, match="is no plain name"):
        load("synth", "synth_shapes", [f"split={json.dumps(split)}"])
    with pytest.raises(DiffalignError, match="is no plain name"):
        load("synth", "synth_shapes", [f"generators.0.name={json.dumps(split)}"])


def test_a_split_in_a_row_costs_the_row(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pictures.smooth(1 + (name == "b")).save(tmp_path / f"{name}.png")
    rows = [
        {"prompt": f"p{n}", "winner": "a.png", "loser": "b.png", "split": s} for n, s in enumerate(["test", *SPLITS])
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = write_imported(open_rows([tmp_path / "t.jsonl"], None)[1], tmp_path / "out")
    # A split that is empty means none, and blanks around one do not count.
    assert set(report.splits) == {"test", "train", "a"}
    assert len(report.faults) == len(SPLITS) - 2
    assert not is_plain_name("../x") and is_plain_name("x")


# --- links ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A folder that nobody means to publish."""
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "secret.txt").write_text("SECRET")
    (folder / "secret.json").write_text('{"prompt": "SECRET"}')
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "secret.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "prompt": "SECRET"}\n')
    return folder


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    folder = tmp_path / "foreign"
    for side, value in (("w", 1), ("l", 2)):
        (folder / side).mkdir(parents=True)
        for name in ("good", "bad"):
            pictures.smooth(value + 10 * (name == "bad")).save(folder / side / f"{name}.png")
    (folder / "w" / "good.txt").write_text("a cat")
    return folder


def holds_secret(folder: Path) -> bool:
    return any(b"SECRET" in data for data in tree(folder).values())


@pytest.mark.parametrize("suffix", [".txt", ".caption", ".json"])
def test_captions_behind_links_are_not_read(tmp_path: Path, private: Path, foreign: Path, suffix: str) -> None:
    target = private / ("secret.json" if suffix == ".json" else "secret.txt")
    (foreign / "w" / f"bad{suffix}").symlink_to(target)
    report = write_imported(open_rows([foreign], None)[1], tmp_path / "out")
    assert report.groups == 1 and "is a link that leads out" in report.faults[0].reason
    assert (
        score(ScoreRequest([str(foreign)], ["sharpness"], output=tmp_path / "s.jsonl", html=tmp_path / "s.html")) == 0
    )
    for name in ("s.jsonl", "s.html"):
        assert "SECRET" not in (tmp_path / name).read_text()
    with pytest.raises(DiffalignError, match="is a link that leads out"):
        import_pairs([foreign / "w", foreign / "l"], tmp_path / "pairs")
    assert not holds_secret(tmp_path / "out")


@pytest.mark.parametrize("side", ["w", "l"])
def test_images_behind_links_are_not_read(tmp_path: Path, private: Path, foreign: Path, side: str) -> None:
    (foreign / "w" / "bad.txt").write_text("a dog")
    (foreign / side / "bad.png").unlink()
    (foreign / side / "bad.png").symlink_to(private / "secret.png")
    report = write_imported(open_rows([foreign], None)[1], tmp_path / "out")
    assert report.groups == 1 and "is a link that leads out" in report.faults[0].reason
    assert score(ScoreRequest([str(foreign)], ["sharpness"], output=tmp_path / "s.jsonl")) == 3
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [row["sha256"] is None for row in rows] == [row["image"].endswith(f"{side}/bad.png") for row in rows]


def test_files_of_rows_behind_links_are_refused(tmp_path: Path, private: Path) -> None:
    for name in ("metadata.jsonl", "train.json", "rows.jsonl"):
        folder = tmp_path / name
        folder.mkdir()
        pictures.smooth(1).save(folder / "a.png")
        (folder / name).symlink_to(private / "metadata.jsonl")
        with pytest.raises(DiffalignError, match="is a link that leads out"):
            write_imported(open_rows([folder], None)[1], tmp_path / "out")
    with pytest.raises(DiffalignError, match="is a link that leads out"):
        collect([str(tmp_path / "metadata.jsonl")])
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "train.txt").symlink_to(private / "secret.txt")
    with pytest.raises(DiffalignError, match="is a link that leads out"):
        read_prompts(tmp_path / "prompts")


def test_a_table_behind_a_link_is_counted(tmp_path: Path, private: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    dataset(private / "data")
    image = next((private / "data" / "images").glob("*.parquet"))
    table = pq.read_table(image).drop_columns(["group_id"])
    pq.write_table(table, private / "t.parquet")
    pq.write_table(table, folder / "own.parquet")
    (folder / "linked.parquet").symlink_to(private / "t.parquet")
    assert score(ScoreRequest([str(folder)], ["sharpness"], output=tmp_path / "s.jsonl")) == 0
    assert "1 links that lead out of the folder" in capsys.readouterr().err
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == table.num_rows


def test_links_within_the_folder_and_in_the_cache_of_the_hub_are_read(tmp_path: Path, private: Path) -> None:
    snapshot = tmp_path / "datasets--x" / "snapshots" / "abc"
    (snapshot / "sub").mkdir(parents=True)
    blobs = tmp_path / "datasets--x" / "blobs"
    blobs.mkdir()
    (blobs / "1").write_text("x")
    (snapshot / "a.txt").symlink_to("../../blobs/1")
    (snapshot / "sub" / "b.txt").symlink_to("../a.txt")
    (snapshot / "c.txt").symlink_to(private / "secret.txt")
    assert not leads_out(snapshot, snapshot / "a.txt")
    assert not leads_out(snapshot, snapshot / "sub" / "b.txt")
    assert leads_out(snapshot, snapshot / "c.txt")
    # The folder itself may be a link, and a link to it leads nowhere else.
    (tmp_path / "alias").symlink_to(snapshot)
    assert not leads_out(tmp_path / "alias", tmp_path / "alias" / "a.txt")
    assert leads_out(snapshot / "sub", snapshot / "sub" / "c.txt") is False  # not there, and no link


def test_the_owner_of_links_may_have_them_followed(
    tmp_path: Path, private: Path, foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLLOW_LINKS, "1")
    (foreign / "w" / "bad.txt").symlink_to(private / "secret.txt")
    assert write_imported(open_rows([foreign], None)[1], tmp_path / "out").groups == 2


def test_relative_folders(tmp_path: Path, foreign: Path, private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (foreign / "w" / "bad.txt").symlink_to(os.path.relpath(private / "secret.txt", foreign / "w"))
    assert write_imported(open_rows([Path("foreign")], None)[1], Path("out")).groups == 1
