"""The notebook: a valid file without outputs, whose cells run from top to bottom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "integrations" / "score_images.ipynb"
pytestmark = pytest.mark.skipif(not NOTEBOOK.is_file(), reason="integrations/ is in a checkout only")


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    said = capsys.readouterr().out
    assert "A against B" in said and "16 images; the best is images/" in said and "0 scores new" in said
    assert len(names["rows"]) == 16 and all(row["geneval"] is not None for row in names["rows"])
    for page in ("pairs.html", "gallery.html"):
        assert (tmp_path / page).stat().st_size > 10_000
