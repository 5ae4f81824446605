"""Write the gallery of scored images: an HTML page to look, filter and choose, which needs no network."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from diffalign.files import write_whole
from diffalign.redaction import without_folders
from diffalign.report.page import policy_of_script, render_page
from diffalign.scoring.items import Item
from diffalign.scoring.run import Scores
from diffalign.scoring.score_summary import Summary, columns_of, summarise
from diffalign.scoring.thumbnails import delete_unused, thumbnails_of

MOST = 20_000
"""Images in one page; of more, every reward's ranking is shown at even steps from best to worst."""


@dataclass(frozen=True)
class Card:
    """An image in the page.

    name: without folders that say whose machine it was. sha256: its first 16 digits, by which a favourite is known.
    thumbnail, link: for `src` and `href`, "" where there is none. values: in the order of the columns, None where not
    scored.
    """

    name: str
    sha256: str
    prompt: str
    reason: str
    thumbnail: str
    link: str
    values: list[float | None]


def write_gallery(path: Path, scores: Scores, most: int = MOST) -> int:
    """Write the page, and the thumbnails of many images beside it; return how many images it shows."""
    columns = columns_of(scores)
    chosen = choose(scores, columns, most)
    thumbnails = thumbnails_of(path, [scores.items[i] for i in chosen])
    cards = [
        _card(scores.items[i], scores.rows[i], scores, columns, thumbnail, path)
        for i, thumbnail in zip(chosen, thumbnails, strict=True)
    ]
    script = render_page("diffalign.scoring", "gallery.js.j2")
    html = render_page(
        "diffalign.scoring",
        "gallery.html.j2",
        shown=len(cards),
        data={"columns": columns, "images": [asdict(card) for card in cards]},
        columns=columns,
        total=len(scores.rows),
        unscored=scores.failed,
        charts=[(s, bars(s)) for s in summarise(scores)],
        script=script,
        policy=policy_of_script(script, images="'self' data: file:"),
    )
    write_whole(path, html)
    delete_unused(path, thumbnails)
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


def _card(item: Item, row: dict[str, Any], scores: Scores, columns: Sequence[str], thumbnail: str, page: Path) -> Card:
    return Card(
        name=shown_name(item),
        sha256=(row.get("sha256") or "")[:16],
        prompt=item.prompt or "",
        reason=without_folders("; ".join(reasons_of(row, scores.columns))),
        thumbnail=thumbnail,
        link=link_to(item, page),
        # Nine digits hold a float32 exactly.
        values=[float(f"{row[c]:.9g}") if math.isfinite(row[c]) else None for c in columns],
    )


def shown_name(item: Item) -> str:
    """Return an image's name as the page shows it: of an absolute path, the source's last folder and what is below it."""
    source = item.name.removesuffix(item.key)
    bare = source.rstrip("/#")
    home = Path.home()
    if source == item.name or Path(bare or "/") in (home, *home.parents):
        return str(without_folders(item.name))
    return f"{without_folders(bare)}{source[len(bare) :]}{without_folders(item.key)}"


def link_to(item: Item, page: Path) -> str:
    """Return the way from the page to an image's file; "" if it is in a container, or if the way would name a user.

    That is so where page and image have only `/` or the folder of all homes in common.
    """
    if item.path is None:
        return ""
    folder, file = page.absolute().parent, item.path.absolute()
    home = Path.home().absolute()
    try:
        common = Path(os.path.commonpath([folder, file]))
    except ValueError:  # on two drives
        return ""
    if common in home.parents:
        return ""
    return quote(os.fsencode(Path(os.path.relpath(file, folder)).as_posix()))


def reasons_of(row: dict[str, Any], labels: Iterable[str]) -> list[str]:
    """Return why an image has no score, each reason once: why it cannot be read, or what its rewards said."""
    reasons = [row["reason"]] if row["reason"] else [row[f"{label}.reason"] for label in labels]
    return list(dict.fromkeys(reason for reason in reasons if reason))


def bars(summary: Summary, width: int = 240, height: int = 56) -> list[dict[str, float]]:
    """Return the rectangles of a histogram."""
    tallest = max(1, *summary.counts)
    step = width / len(summary.counts)
    return [
        {"x": round(k * step, 2), "y": round(height - height * n / tallest, 2), "w": round(step - 1, 2),
         "h": round(height * n / tallest, 2), "n": n}
        for k, n in enumerate(summary.counts)
    ]  # fmt: skip
