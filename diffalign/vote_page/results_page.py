"""Write the page of what votes say: one HTML file with tables, intervals and some of the pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffalign.files import write_whole
from diffalign.intervals import Interval
from diffalign.redaction import without_folders
from diffalign.report.page import render_page
from diffalign.scoring.items import Item
from diffalign.scoring.thumbnails import thumbnail
from diffalign.vote_page.gallery import Gallery
from diffalign.voting.log import Vote
from diffalign.voting.results import Comparison, Results, comparisons

SIDE = 320
"""Pixels of an image's longer side in the page."""
MOST = 8
"""Pairs that are shown for each reason."""


@dataclass(frozen=True)
class Example:
    """A pair in the page. pictures: data URIs, "" where there is none. chosen: 0, 1 or None. said: what people said of it."""

    prompt: str
    models: tuple[str, str]
    pictures: tuple[str, str]
    chosen: int | None
    said: list[str]


@dataclass(frozen=True)
class Bar:
    """A value with its interval for a picture, in percent of the width. ends: None where there is no interval."""

    at: float
    ends: tuple[float, float] | None


def bar(value: float, interval: Interval) -> Bar:
    """Return where a share in [0, 1] and its interval are drawn."""
    ends = None if interval.low is None or interval.high is None else (100 * interval.low, 100 * interval.high)
    return Bar(100 * value, ends)


def write_results(
    path: Path, found: Results, votes: Sequence[Vote], gallery: Gallery, scores: Mapping[str, Mapping[str, float]]
) -> None:
    """Write the page. scores: reward -> image's name -> score, as `results` took them."""
    examples = {
        "People disagree": _disagreements(votes),
        "With a note": [
            (one, [f"{vote.rater}: {vote.note}"]) for vote in votes if vote.note for one in comparisons(vote)[:1]
        ],
        **{f"Against {name}": _against(votes, known) for name, known in scores.items()},
    }
    shown = {title: [_example(gallery, *one) for one in pairs[:MOST]] for title, pairs in examples.items() if pairs}
    html = render_page(
        "diffalign.vote_page",
        "results.html.j2",
        about=without_folders(gallery.about),
        found=found,
        bar=bar,
        examples=shown,
        totals={title: len(pairs) for title, pairs in examples.items()},
    )
    write_whole(path, html)


Shown = tuple[Comparison, list[str]]
"""A pair, and what is said of it."""


def _disagreements(votes: Sequence[Vote]) -> list[Shown]:
    """Return the pairs of which people prefer different images, those with most answers first."""
    answers: dict[frozenset[str], list[Comparison]] = {}
    for vote in votes:
        if vote.repeat_of is None:
            for one in comparisons(vote):
                answers.setdefault(frozenset(one.images), []).append(one)
    found = []
    for same in answers.values():
        first = same[0]
        signs = [one.sign if one.images == first.images else -one.sign for one in same]
        if 1 in signs and -1 in signs and len({one.rater for one in same}) > 1:
            said = [f"{one.rater}: {_words(sign)}" for one, sign in zip(same, signs, strict=True)]
            found.append((Comparison(first.images, first.models, 0, first.prompt, "", ""), said))
    return sorted(found, key=lambda one: -len(one[1]))


def _words(sign: int) -> str:
    return {1: "left", -1: "right", 0: "neither"}[sign]


def _against(votes: Sequence[Vote], scores: Mapping[str, float]) -> list[Shown]:
    """Return the pairs of which a reward prefers the other image than people did, the surest first."""
    found: dict[tuple[frozenset[str], str], tuple[float, Comparison, list[str]]] = {}
    for vote in votes:
        for one in comparisons(vote) if vote.repeat_of is None else ():
            gap = scores.get(one.images[0], np.nan) - scores.get(one.images[1], np.nan)
            if one.sign * gap < 0:
                chosen = one.images[0 if one.sign > 0 else 1]
                key = (frozenset(one.images), chosen)
                found.setdefault(key, (abs(gap), one, []))[2].append(vote.rater)
    rows = sorted(found.values(), key=lambda row: -row[0])
    return [
        (one, [f"chosen by {', '.join(raters)}; the reward says {_scores(one, scores)}"]) for _, one, raters in rows
    ]


def _scores(one: Comparison, scores: Mapping[str, float]) -> str:
    return " and ".join(f"{scores[name]:.4g}" for name in one.images)


def _example(gallery: Gallery, one: Comparison, said: list[str]) -> Example:
    origins = gallery.origin_of
    pictures = [thumbnail(Item(name, name, origins[name]), SIDE) if name in origins else "" for name in one.images]
    chosen = None if one.sign == 0 else int(one.sign < 0)
    return Example(one.prompt, one.models, (pictures[0], pictures[1]), chosen, said)
