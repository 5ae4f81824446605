"""The notebooks: valid files without outputs, whose cells run from top to bottom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "integrations"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="integrations/ is in a checkout only")


def cells(name: str) -> list[tuple[str, str]]:
    """Return id and code of a notebook's cells of code."""
    notebook = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    return [(cell["id"], "".join(cell["source"])) for cell in code]


def run(code: list[tuple[str, str]]) -> dict[str, Any]:
    """Run cells as one program, and return its names."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for name, text in code:
        exec(compile(text, name, "exec"), names)
    return names


def test_scoring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(cells("score_images.ipynb"))
    said = capsys.readouterr().out
    assert "A against B" in said and "16 images; the best is images/" in said and "0 scores new" in said
    assert len(names["rows"]) == 16 and all(row["geneval"] is not None for row in names["rows"])
    for page in ("pairs.html", "gallery.html"):
        assert (tmp_path / page).stat().st_size > 10_000


def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With fewer prompts and steps than the notebook states, and one thread: two wait for each other on a busy machine."""
    monkeypatch.chdir(tmp_path)
    shorter = {
        "prompts, steps, test_prompts = 48, 80, 24": "prompts, steps, test_prompts = 8, 2, 2",
        "steps: 8": "steps: 2",
        "steps=8": "steps=2",
        'train={"steps": steps}': 'train={"steps": steps, "groups_per_step": 2, "threads": 1}',
    }
    code = cells("train_on_pairs.ipynb")
    for long, short in shorter.items():
        assert sum(long in text for _, text in code) == 1
        code = [(name, text.replace(long, short)) for name, text in code]
    names = run(code)
    said = capsys.readouterr().out
    assert "8 pairs in data/mine" in said and "2 prompts: base " in said
    assert (names["run"] / "weights").is_dir() and (names["run"] / "report.html").is_file()
    assert (
        names["sheet"].getcolors(maxcolors=100_000) is not None
        and len(names["shown"][0]) == len(names["shown"][1]) == 4
    )
