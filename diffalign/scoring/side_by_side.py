"""Write one HTML file of two sets of images in pairs: who wins by each reward, then every pair with both scores."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.files import write_whole
from diffalign.redaction import without_folders
from diffalign.report.page import render_page
from diffalign.scoring.compare_folders import outcomes
from diffalign.scoring.gallery import reasons_of, spread_choice
from diffalign.scoring.pairing import Pairing, heading
from diffalign.scoring.run import Scores
from diffalign.scoring.thumbnails import INSIDE, thumbnail

SIDE = 384
"""Pixels of an image's longer side in the page."""


@dataclass(frozen=True)
class Pair:
    """A pair in the page. scores: (A, B) in the order of the columns, None where not scored, with the reasons beside them."""

    prompt: str
    names: tuple[str, str]
    pictures: tuple[str, str]
    scores: list[tuple[float | None, float | None]]
    reasons: list[str]


def write_side_by_side(
    path: Path, a: Scores, b: Scores, pairing: Pairing, names: tuple[str, str], most: int = INSIDE // 2
) -> int:
    """Write the page; return how many pairs it shows, of more than `most` those at even steps of the differences."""
    found = outcomes(a, b, pairing)
    columns = list(found)
    couples = [pair for prompt in pairing.prompts for pair in prompt]
    differences = np.array([[b.rows[j][c] - a.rows[i][c] for c in columns] for i, j in couples], dtype=np.float64)
    chosen = spread_choice(differences.reshape(-1, len(columns)), most)
    chosen.sort(key=lambda n: -abs(differences[n, 0]) if math.isfinite(differences[n, 0]) else 1.0)
    pairs = [_pair(a, b, *couples[n], columns) for n in chosen]
    html = render_page(
        "diffalign.scoring",
        "side_by_side.html.j2",
        names=without_folders(names),
        heading=heading(pairing),
        total=len(couples),
        columns=columns,
        outcomes=found,
        pairs=pairs,
    )
    write_whole(path, html)
    return len(pairs)


def _pair(a: Scores, b: Scores, i: int, j: int, columns: list[str]) -> Pair:
    one, two = a.items[i], b.items[j]
    return Pair(
        prompt=one.prompt or two.prompt or "",
        names=(one.key, two.key),
        pictures=(thumbnail(one, SIDE), thumbnail(two, SIDE)),
        scores=[(_finite(a.rows[i][c]), _finite(b.rows[j][c])) for c in columns],
        reasons=[without_folders(_reason(a.rows[i], b.rows[j], c.partition(".")[0])) for c in columns],
    )


def _reason(a: dict[str, Any], b: dict[str, Any], label: str) -> str:
    """Return why a label has no score in a pair, "" where both have one."""
    one, two = ("; ".join(reasons_of(row, [label])) for row in (a, b))
    if one == two:
        return one and f"both: {one}"
    return "; ".join(f"{side}: {reason}" for side, reason in (("A", one), ("B", two)) if reason)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
