"""What may be published names no folder of the machine, and so no user."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.dataset_card import write_own_card
from diffalign.data.dataset_export import export
from diffalign.data.schema import score_schema
from diffalign.data.writer import ImageWriter, parquet_writer, write_groups
from diffalign.redaction import without_folders
from diffalign.report.contact_sheet import write_contact_sheet
from diffalign.report.render import write_report, write_reports
from diffalign.stages.data import write_sheet
from diffalign.stages.score import ScoreRequest, score
from helpers import pictures
from helpers.files import tree
from helpers.small_datasets import group_rows

HOME = "/home/some-user"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"{HOME}/models/sdxl", "sdxl"), (f"{HOME}/my models/sd xl", "sd xl"), (f"{HOME}/models/", "models"),
        ("~/x/y.png", "y.png"),
        (r"C:\Users\me\models\x", "x"), (f"data.path: {HOME}/d/x\nrun_dir: runs/x\n", "data.path: x\nrun_dir: runs/x\n"),
        (f"'{HOME}/a/b.png' is a link out of {HOME}/a", "'b.png' is a link out of a"), (f"path={HOME}/a, k=1", "path=a, k=1"),
        (f"x ({HOME}/a/b.txt)", "x (b.txt)"), ("runs/a/weights", "runs/a/weights"), ("owner/name", "owner/name"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"), ("a / b, 1/2, and/or", "a / b, 1/2, and/or"),
        ("</p>", "</p>"), ("/", "/"), ("", ""), ("a/../b", "a/../b"), ("tag:yaml.org,2002:null", "tag:yaml.org,2002:null"),
    ],
)  # fmt: skip
def test_texts(text: str, shown: str) -> None:
    assert without_folders(text) == shown
    assert without_folders({"a": [text], "b": 1.5}) == {"a": [shown], "b": 1.5}


def published(folder: Path, *roots: str) -> list[str]:
    """Return the text files below a folder that name one of the roots."""
    return [
        name
        for name, data in tree(folder).items()
        if Path(name).suffix in (".md", ".html", ".json", ".parquet", ".tar") and any(r.encode() in data for r in roots)
    ]


def test_datasets_cards_sheets_and_exports(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    provenance = {"model": f"{HOME}/models/x", "weights": f"{HOME}/runs/w"}
    with ImageWriter(folder) as writer:
        for group, count in {"a": 3, "b": 3, "c": 2}.items():
            for k in range(count):
                writer.write(group, k, pictures.smooth(k), "model", k, provenance)
    write_groups(folder, group_rows())  # type: ignore[arg-type]  # plain dicts
    (folder / "generators").mkdir()
    (folder / "generators" / "x.json").write_text(
        json.dumps({"model": f"{HOME}/models/x", "revision": None, "licence": None})
    )
    settings = {"weights": f"{HOME}/weights/h.pt", "rubric": f"{HOME}/r.txt"}
    note = {"version": "1", "weights": f"{HOME}/weights/h.pt", "licence": "MIT", "settings": settings}
    with parquet_writer(folder / "scores" / "r.parquet", score_schema(("score",), note)):
        pass
    dataset = PreferenceDataset(folder)
    assert [one["model"] for _, one in dataset.provenance()] == ["x"] * 8
    out = tmp_path / "out"
    write_own_card(dataset)
    for form in ("rows", "pickapic", "webdataset"):
        export(dataset, out / form, form)
    write_sheet(dataset, out / "sheet.html", 5)
    write_contact_sheet(out / "more.html", "x", {"folder": f"{HOME}/d"}, [])
    (out / "README.md").write_text((folder / "README.md").read_text())
    assert published(out, "some-user", str(tmp_path)) == []
    assert "| x | x | local |" in (out / "README.md").read_text()


def test_galleries(tmp_path: Path) -> None:
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
        pictures.smooth(1 + (side == "b")).save(tmp_path / side / "x.png")
        (tmp_path / side / "y.png").write_bytes(b"nothing")
        (tmp_path / side / "z.png").symlink_to("/etc/hostname")
    out = tmp_path / "out"
    score(ScoreRequest([str(tmp_path / "a")], ["sharpness"], html=out / "one.html"))
    score(ScoreRequest([str(tmp_path / "a")], ["sharpness"], html=out / "two.html", against=[str(tmp_path / "b")]))
    assert published(out, str(tmp_path)) == [] and len(tree(out)) == 2


def test_reports(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run = tmp_path / name
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "lr": 0.1}\n{"step": 2, "loss": 0.4, "lr": 0.1}\n')
        (run / "config.yaml").write_text(
            f"kind: train\nmodel:\n  path: {HOME}/models/{name}\ndata:\n  path: {HOME}/data/{name}\nrun_dir: {run}\n"
        )
        write_report(run)
        page = (run / "report.html").read_text()
        assert "some-user" not in page and str(tmp_path) not in page and name in page
    write_reports([tmp_path / "one", tmp_path / "two"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "some-user" not in page and str(tmp_path) not in page
