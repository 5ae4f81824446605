"""report.html: one file, without network, in which text from data stays text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.report.curves import line_chart, number, smooth, ticks
from diffalign.report.render import write_report

SCRIPT = '<script>alert("x")</script> "a\' onerror=alert(1)'


def comparison(difference: float) -> dict[str, float]:
    return {
        "prompts": 3, "base": 0.25, "tuned": 0.25 + difference, "difference": difference, "low": difference - 0.1,
        "high": difference + 0.1, "win_rate": 0.61, "win_low": 0.5, "win_high": 0.7,
    }  # fmt: skip


def make_run(folder: Path, prompt: str = "a red cube") -> Path:
    """A run directory with metrics and an evaluation of three prompts; the second's tuned image was not scored."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = [{"step": s, "loss": float(0.7 - s / 100 + rng.normal() / 50), "lr": 1e-3} for s in range(1, 41)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "config.yaml").write_text(f"run_dir: x  # {SCRIPT}\n")
    images = {m: str(folder / "eval" / "images" / m) for m in ("base", "tuned")}
    lines = []
    for m, path in images.items():
        Path(path).mkdir(parents=True, exist_ok=True)
        for p in range(3):
            Image.new("RGB", (64, 64), (60 * p, 90, 200)).save(Path(path) / f"{p:05d}-0.png")
            score = None if (m, p) == ("tuned", 1) else p / 10 + (0.2 if m == "tuned" else 0)
            lines.append({"model": m, "prompt": prompt, "seed": 7, "index": [p, 0], "geneval.dense": score})
    (folder / "eval" / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result: dict[str, Any] = {"seed": 0, "seeds": 1, "prompts": [prompt] * 3, "images": images}
    result["scores"] = {"geneval.dense": {"all": comparison(0.2), SCRIPT: comparison(-0.3)}}
    (folder / "eval.json").write_text(json.dumps(result))
    return folder


class Tags(HTMLParser):
    """Every tag with its attributes, and the text outside of style and tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_text_stays_text_and_nothing_is_fetched(tmp_path: Path) -> None:
    html = write_report(make_run(tmp_path / "run", SCRIPT)).read_text()
    page = Tags(html)
    names = {name for name, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base"}
    assert page.text.count(SCRIPT) >= 4  # prompts, kind and config are all there to read
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "data:image/").startswith("data:image/")
    assert not re.search(r"url\(|@import|https?://", html)


def test_what_the_report_says(tmp_path: Path) -> None:
    page = Tags(write_report(make_run(tmp_path / "run")).read_text())
    for said in ("40 steps", "3 held-out prompts", "+0.200", "+0.100 to +0.300", "61.0%", "Largest gains"):
        assert said in page.text, said
    pictures = [a for name, a in page.tags if name == "img"]
    assert len(pictures) == 2 * 2  # the prompt without a score has no place among gains and losses


def test_a_run_without_evaluation_has_a_report(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "eval.json").unlink()
    page = Tags(write_report(tmp_path).read_text())
    assert "Training" in page.text and "win rate" not in page.text


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match=r"neither metrics\.jsonl nor eval\.json"):
        write_report(tmp_path)


def test_charts() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert [number(v) for v in (0, 0.69314, 1.2e-5, 400)] == ["0", "0.6931", "1.2e-05", "400"]
    assert smooth([1.0, 1.0, 1.0, 1.0], 3) == pytest.approx([1, 1, 1, 1])
    assert line_chart("loss", [1], [0.5]) is None
    assert line_chart("loss", [1, 2, 3], [0.5, float("nan"), float("inf")]) is None
    flat = line_chart("loss", [1, 2, 3], [0.0, 0.0, 0.0])
    assert flat is not None and "nan" not in flat.svg
