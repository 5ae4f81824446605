"""Objectives and rewards of other packages: by entry point and as `module:Class`, and what is said after a mistake."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from helpers.foreign_package import (
    ROOT,
    rows_of,
    run_verbs,
    training,
    write_images,
    write_package,
)


def test_an_installed_package_trains_and_scores(tmp_path: Path, sd3_dir: Path) -> None:
    site = tmp_path / "site"
    source = write_package(tmp_path / "source")
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", site, source]
    subprocess.run([sys.executable, "-m", "pip", *map(str, install)], check=True, capture_output=True, text=True)
    images, data = write_images(tmp_path / "images"), tmp_path / "data"
    table = tmp_path / "scores.jsonl"
    by_class = "another_package.judges:Brightness"
    said = run_verbs(
        ["pairs", str(images / "w"), str(images / "l"), "--out", str(data)],
        training(tmp_path / "by_name", "{name: hinge, target: 0.5}", data, sd3_dir),
        training(tmp_path / "by_class", '{name: "another_package.losses:Hinge", target: 0.5}', data, sd3_dir),
        ["rewards"],
        ["score", str(images), "-r", "brightness", "-r", f"half={by_class}:scale=0.5", "-o", str(table)],
        ["score", str(data), "-r", by_class, "--into-dataset"],
        first=site,
        folder=tmp_path,
    )
    assert "brightness" in said
    for name in ("by_name", "by_class"):
        rows = rows_of(tmp_path / name / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2] and rows[0]["loss"] == rows[0]["short_of"] == 0.5
        assert "Short of the target" in (tmp_path / name / "report.html").read_text()
    for row in rows_of(table):
        expected = 200 / 255 if "/w/" in str(row["image"]) else 50 / 255
        assert row["brightness"] == pytest.approx(expected, abs=0.02)
        assert row["half"] == pytest.approx(row["brightness"] / 2, rel=1e-6)
    assert [path.name for path in (data / "scores").iterdir()] == ["brightness.parquet"]


def checkout(folder: Path) -> Path:
    """A checkout of links to this one, with copies of what a contributor changes."""
    (folder / "diffalign").mkdir(parents=True)
    shutil.copy(ROOT / "diffalign" / "__init__.py", folder / "diffalign")
    shutil.copytree(ROOT / "diffalign" / "objectives", folder / "diffalign" / "objectives")
    shutil.copytree(ROOT / "rewards", folder / "rewards")
    for path in (
        *(ROOT / "diffalign").iterdir(),
        *(ROOT / name for name in ("pyproject.toml", "pipelines", "configs")),
    ):
        if not (folder / path.relative_to(ROOT)).exists():
            (folder / path.relative_to(ROOT)).symlink_to(path)
    return folder


def follow(section: str, root: Path) -> dict[str, int]:
    """Do what the code blocks of a section of CONTRIBUTING.md say. Returns file -> lines that were written."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    written: dict[str, int] = {}
    for kind, name, body in re.findall(r"^```(python|diff)\n ?# (\S+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        path, block = root / name, body.splitlines()
        if kind == "python":
            assert not path.exists()
            path.write_text(body)
            written[name] = len(block)
            continue
        lines, place = path.read_text().splitlines(), 0
        for line in block:
            # What is there tells where; what follows it is added.
            place = place + 1 if line.startswith("+") else lines.index(line[1:])
            if line.startswith("+"):
                lines.insert(place, line[1:])
        path.write_text("\n".join(lines) + "\n")
        written[name] = sum(line.startswith("+") for line in block)
    return written


def test_contributing_is_true_to_the_letter(tmp_path: Path, sd3_dir: Path) -> None:
    root = checkout(tmp_path / "checkout")
    for section, table in (
        ("A new method", "diffalign/objectives/__init__.py"),
        ("A new reward", "rewards/__init__.py"),
    ):
        written = follow(section, root)
        assert len(written) == 2 and written[table] == 2 and max(written.values()) < 50, written
    images, data, scores = write_images(tmp_path / "images"), tmp_path / "data", tmp_path / "scores.jsonl"
    for n, colour in enumerate([(255, 0, 0), (70, 70, 70)]):
        Image.new("RGB", (16, 16), colour).save(images / f"{n}.png")
    said = run_verbs(
        ["pairs", str(images / "w"), str(images / "l"), "--out", str(data)],
        training(tmp_path / "run", "{name: hinge, target: 0.5}", data, sd3_dir),
        ["rewards"],
        ["score", f"{images}/*.png", "-r", "colourfulness", "-o", str(scores)],
        first=root,
        folder=tmp_path,
    )
    assert "colourfulness" in said
    rows = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2 and rows[0]["loss"] == 0.5 and rows[0]["active"] == 1.0
    assert "Pairs that pull" in (tmp_path / "run" / "report.html").read_text()
    red, grey = (row["colourfulness"] for row in rows_of(scores))
    assert red == pytest.approx(0.3 * (255**2 + 127.5**2) ** 0.5, rel=1e-6) and grey == 0.0
