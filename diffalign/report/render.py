"""`report.html`: what was run, how it went, what changed. One file, no network, opens from disk."""

import base64
import io
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from diffalign import __version__
from diffalign.errors import DiffalignError
from diffalign.report.curves import CHARTS, line_chart

PAIRS_SHOWN = 12
THUMBNAIL = 256


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Rows of metrics.jsonl; none where there is no run."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def thumbnail(path: Path) -> str:
    """A picture as a data URI, at most 256 px wide; small ones stay lossless."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    buffer = io.BytesIO()
    if max(image.size) > THUMBNAIL:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.save(buffer, format="JPEG", quality=82)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def pairs(run_dir: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Images side by side at equal seeds: the largest gains, then the largest losses, in the first score."""
    column = next(iter(result["scores"]))
    rows = [json.loads(line) for line in (run_dir / "eval" / "scores.jsonl").read_text().splitlines()]
    scores: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        scores.setdefault(tuple(row["index"]), {"prompt": row["prompt"]})[row["model"]] = row[column]
    known = {k: v for k, v in scores.items() if v.get("base") is not None and v.get("tuned") is not None}
    change = sorted(known, key=lambda k: (known[k]["tuned"] - known[k]["base"], k))
    best, worst = change[::-1][:PAIRS_SHOWN], change[:PAIRS_SHOWN]
    shown = [(k, "best") for k in best] + [(k, "worst") for k in worst if k not in best]
    return [
        {
            "kind": kind,
            "prompt": known[k]["prompt"],
            "seed": k[1],
            "base": known[k]["base"],
            "tuned": known[k]["tuned"],
            "images": {m: thumbnail(Path(result["images"][m]) / f"{k[0]:05d}-{k[1]}.png") for m in ("base", "tuned")},
        }
        for k, kind in shown
    ]


def write_report(run_dir: Path, result: dict[str, Any] | None = None) -> Path:
    """Write `run_dir`/report.html from its metrics, config and, if there is one, its evaluation."""
    run_dir = Path(run_dir)
    if result is None and (run_dir / "eval.json").is_file():
        result = json.loads((run_dir / "eval.json").read_text())
    rows = read_metrics(run_dir)
    if not rows and result is None:
        raise DiffalignError(f"{run_dir} holds neither metrics.jsonl nor eval.json; there is nothing to report")
    steps = [int(row["step"]) for row in rows]
    charts = [line_chart(name, steps, [row[name] for row in rows]) for name in CHARTS if rows and name in rows[0]]
    config = run_dir / "config.yaml"
    environment = Environment(
        loader=PackageLoader("diffalign.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        name=run_dir.name,
        version=__version__,
        steps=steps[-1] if steps else 0,
        charts=[{"title": c.title, "note": c.note, "last": c.last, "svg": Markup(c.svg)} for c in charts if c],
        result=result,
        pairs=pairs(run_dir, result) if result else [],
        config=config.read_text() if config.is_file() else "",
    )
    path = run_dir / "report.html"
    path.with_suffix(".part").write_text(html, encoding="utf-8")
    path.with_suffix(".part").replace(path)
    return path
