"""Write one HTML file of images and scores that sorts by any reward, needs no network and shows no text as markup."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffalign.files import write_whole
from diffalign.files.images import Unreadable, decode
from diffalign.report.page import data_uri, encoded, render_page
from diffalign.scoring.items import Item
from diffalign.scoring.run import Scores
from diffalign.scoring.score_summary import Summary, columns_of, summarise

THUMBNAIL = 256
MOST = 400
"""Images in one page; of more, every reward's ranking is shown at even steps from best to worst."""


@dataclass(frozen=True)
class Card:
    """An image in the page. values: in the order of the columns, None where not scored."""

    image: str
    prompt: str
    picture: str
    values: list[float | None]
    reason: str


def write_gallery(path: Path, scores: Scores, most: int = MOST) -> int:
    """Write the page; return how many images it shows."""
    columns = columns_of(scores)
    chosen = choose(scores, columns, most)
    cards = [_card(scores.items[i], scores.rows[i], scores, columns) for i in chosen]
    html = render_page(
        "diffalign.scoring",
        "gallery.html.j2",
        cards=cards,
        columns=columns,
        total=len(scores.rows),
        unscored=scores.failed,
        charts=[(s, bars(s)) for s in summarise(scores)],
    )
    write_whole(path, html)
    return len(cards)


def choose(scores: Scores, columns: list[str], most: int) -> list[int]:
    """Return the rows to show, best first by the first column: all, or `most` at even steps of every column's ranking."""
    values = np.array([[row[c] for c in columns] for row in scores.rows], dtype=np.float64)
    return spread_choice(values.reshape(-1, len(columns)), most)


def spread_choice(values: np.ndarray, most: int) -> list[int]:
    """Return rows of `values` [N, columns], highest first by the first column; NaN is last.

    All of them, or `most` at even steps of every column's ranking.
    """
    order = [np.argsort(-np.nan_to_num(column, nan=-math.inf), kind="stable") for column in values.T]
    if len(values) <= most:
        return [int(i) for i in order[0]]
    each = max(1, most // len(order))
    picked = {int(i) for o in order for i in o[np.linspace(0, len(o) - 1, each).round().astype(int)]}
    return [int(i) for i in order[0] if int(i) in picked]


def _card(item: Item, row: dict[str, Any], scores: Scores, columns: Sequence[str]) -> Card:
    return Card(
        image=item.name,
        prompt=item.prompt or "",
        picture=thumbnail(item),
        values=[row[c] if math.isfinite(row[c]) else None for c in columns],
        reason="; ".join(reasons_of(row, scores.columns)),
    )


def reasons_of(row: dict[str, Any], labels: Iterable[str]) -> list[str]:
    """Return why an image has no score, each reason once: why it cannot be read, or what its rewards said."""
    reasons = [row["reason"]] if row["reason"] else [row[f"{label}.reason"] for label in labels]
    return list(dict.fromkeys(reason for reason in reasons if reason))


def thumbnail(item: Item, side: int = THUMBNAIL) -> str:
    """Return the image as a data URI of at most `side` pixels; "" if it cannot be read."""
    try:
        picture = decode(item.origin.read())
    except Unreadable:
        return ""
    picture.thumbnail((side, side), Image.Resampling.BICUBIC)
    return data_uri(encoded(picture, "JPEG", quality=82), "jpeg")


def bars(summary: Summary, width: int = 240, height: int = 56) -> list[dict[str, float]]:
    """Return the rectangles of a histogram."""
    tallest = max(1, *summary.counts)
    step = width / len(summary.counts)
    return [
        {"x": round(k * step, 2), "y": round(height - height * n / tallest, 2), "w": round(step - 1, 2),
         "h": round(height * n / tallest, 2), "n": n}
        for k, n in enumerate(summary.counts)
    ]  # fmt: skip
