"""Prepare a report's images: small, inside the file, largest changes first."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.files import read_json_lines, reading
from diffalign.files.images import data_uri, encoded
from diffalign.report.runs import Run

# (side in pixels, JPEG quality), tried in turn until an image fits: 2,000 images stay below 60 MB in base64.
SIZES = ((256, 82), (256, 65), (192, 60), (128, 50), (96, 40))
BYTES = 20_000
STRIP_STEPS = 12


@dataclass(frozen=True)
class Candidate:
    """A trained model in an evaluation: its label, where its images lie, its comparisons by score and kind."""

    label: str
    folder: Path
    scores: dict[str, dict[str, Any]]
    model: str


def picture_uri(image: Image.Image, wide: bool = False) -> str:
    """Return an image as a data URI of at most 256 px and 20 kB (a strip: 1024 px and 80 kB); small ones stay lossless."""
    scale = 4 if wide else 1
    if max(image.size) <= SIZES[0][0] * scale:
        data = encoded(image, "PNG", optimize=True)
        if len(data) <= BYTES * scale:
            return data_uri(data, "png")
    for side, quality in SIZES:
        small = image.copy()
        small.thumbnail((side * scale, side * scale))
        data = encoded(small, "JPEG", quality=quality)
        if len(data) <= BYTES * scale:
            break
    return data_uri(data, "jpeg")


def thumbnail(path: Path, wide: bool = False) -> str | None:
    """Return an image file as a data URI; None if it does not exist."""
    if not path.is_file():
        return None
    with reading(path, mend="delete it; without it the report shows no image there"), Image.open(path) as opened:
        return picture_uri(opened.convert("RGB"), wide)


def candidates(run: Run, name: str) -> list[Candidate]:
    """Return what a run's evaluation compared with the base: `tuned` first, then further weights.

    name: tells runs apart; empty if there is only one.
    """
    if run.result is None:
        return []
    images = {model: Path(folder) for model, folder in run.result["images"].items()}
    spreads = run.result.get("diversity", {})
    compared = {"tuned": run.result["scores"], **run.result.get("others", {})}
    return [
        Candidate(
            (name or model) if model == "tuned" else f"{name}: {model}" if name else model,
            images[model],
            {**scores, **({"diversity": {"all": spreads[model]["all"]}} if model in spreads else {})},
            model,
        )
        for model, scores in compared.items()
    ]


def trials(runs: list[Run], names: list[str]) -> list[list[tuple[Candidate, Run]]]:
    """Group the candidates that drew the same prompts at the same seeds, so that their images can stand side by side."""
    found: dict[str, list[tuple[Candidate, Run]]] = {}
    for run, name in zip(runs, names, strict=True):
        if run.result is not None:
            key = repr((run.result["seed"], run.result["seeds"], run.result["prompts"]))
            found.setdefault(key, []).extend((c, run) for c in candidates(run, name if len(runs) > 1 else ""))
    return list(found.values())


def _scores(run: Run, column: str) -> dict[tuple[int, int], dict[str, Any]]:
    """Return (prompt, seed) -> {"prompt", model: score}."""
    scores: dict[tuple[int, int], dict[str, Any]] = {}
    for row in read_json_lines(run.folder / "eval" / "scores.jsonl", needs=("index", "prompt", "model")):
        scores.setdefault((row["index"][0], row["index"][1]), {"prompt": row["prompt"]})[row["model"]] = row.get(column)
    return scores


def comparisons(members: list[tuple[Candidate, Run]], shown: int, pictures: bool = True) -> list[dict[str, Any]]:
    """Return rows of images side by side: the `shown` largest gains, then the `shown` largest losses.

    Changes are those of the first score, averaged over candidates. `pictures=False`: return the rows without images. An
    image that one of them could not score is left out.
    """
    column = next(iter(members[0][0].scores))
    base = Path((members[0][1].result or {})["images"]["base"])
    tables = {id(run): _scores(run, column) for _, run in members}
    first = tables[id(members[0][1])]
    changes: dict[tuple[int, int], float] = {}
    for key, scored in first.items():
        values = [tables[id(run)].get(key, {}).get(candidate.model) for candidate, run in members]
        if scored.get("base") is not None and all(v is not None for v in values):
            changes[key] = sum(v - scored["base"] for v in values) / len(values)
    # Sorted by key too, so that equal changes keep their order.
    order = sorted(changes, key=lambda k: (-changes[k], k))
    best = [k for k in order if changes[k] > 0][:shown]
    worst = [k for k in order[::-1] if changes[k] < 0][:shown]
    rows = []
    for key, kind in [(k, "best") for k in best] + [(k, "worst") for k in worst]:
        file = f"{key[0]:05d}-{key[1]}.png"
        entry: dict[str, Any] = {"kind": kind, "prompt": first[key]["prompt"], "change": changes[key], "file": file}
        if pictures:
            shown_ones = [{"label": "base", "score": first[key]["base"], "source": thumbnail(base / file)}]
            for candidate, run in members:
                score = tables[id(run)][key][candidate.model]
                source = thumbnail(candidate.folder / file)
                shown_ones.append({"label": candidate.label, "score": score, "source": source})
            entry["pictures"] = shown_ones
        rows.append(entry)
    return rows


def strip(
    run: Run, rows: list[dict[str, Any]], stem: str, score_of: Callable[[dict[str, Any]], float | None]
) -> list[dict[str, Any]]:
    """Return grids over steps: at most 12, with the first and the last.

    rows: of the run's validations or draws; stem: what their files in samples/ are called before the step.
    """

    def path(row: dict[str, Any]) -> Path:
        return run.folder / "samples" / f"{stem}-{row['step']:08d}.png"

    rows = [row for row in rows if path(row).is_file()]
    if len(rows) > STRIP_STEPS:
        places = [round(i * (len(rows) - 1) / (STRIP_STEPS - 1)) for i in range(STRIP_STEPS)]
        rows = [rows[i] for i in places]
    return [{"step": row["step"], "score": score_of(row), "source": thumbnail(path(row), wide=True)} for row in rows]
