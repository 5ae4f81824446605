"""Write votes for other commands: a table that `pairs` and `score --labels` read, and records that `judge` reads."""

import os
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from diffalign.data.containers import FileOrigin, Origin
from diffalign.data.dataset_export import suffix
from diffalign.errors import DiffalignError
from diffalign.files import make_folder, replacing
from diffalign.files.paths import member_name
from diffalign.judge.records import write_records
from diffalign.scoring.store import write_rows
from diffalign.vote_page.gallery import Gallery
from diffalign.voting.log import Vote

TABLES = (".csv", ".jsonl")
CHOICES = {-1: "a", 1: "b", 0: "tie"}


class Images:
    """The images of a gallery as files in a folder and below it: an image that lies elsewhere is copied once.

    copies: where copies go, below the folder.
    """

    def __init__(self, gallery: Gallery, folder: Path, copies: str) -> None:
        self.folder, self.copies = folder, copies
        self._origins = {
            name: origin
            for group, origins in zip(gallery.groups, gallery.origins, strict=True)
            for name, origin in zip(group.images, origins, strict=True)
        }
        self._written: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        """Return whether the gallery has an image of this name."""
        return name in self._origins

    def path(self, name: str) -> str:
        """Return the path of an image, relative to the folder. Raises Unreadable for one that cannot be read."""
        if name not in self._written:
            self._written[name] = self._below(self._origins[name]) or self._copied(name)
        return self._written[name]

    def _below(self, origin: Origin) -> str | None:
        """Return the path of a file that is in the folder or below it; None for any other image."""
        if not isinstance(origin, FileOrigin):
            return None
        path = os.path.relpath(origin.path, self.folder)
        return None if Path(path).parts[:1] == (os.pardir,) else Path(path).as_posix()

    def _copied(self, name: str) -> str:
        data = self._origins[name].read()
        group, _, rest = name.rpartition("/")
        part = f"{member_name(group)}/{member_name(rest)}" if group else member_name(rest)
        path = f"{self.copies}/{part}.{suffix(data)}"
        make_folder((self.folder / path).parent)
        with replacing(self.folder / path) as whole:
            whole.write_bytes(data)
        return path


def write_table(votes: Sequence[Vote], gallery: Gallery, out: Path) -> int:
    """Write votes as a .csv or .jsonl of choices; return the number of rows.

    image_a, image_b and choice (a, b or tie) as `pairs` and `score --labels` read them, then prompt, model1, model2, and
    from which vote a row is. A ranking is one row with `images` and `ranking` in a .jsonl; in a .csv each two of its
    images are a row. Skipped questions are left out. Images in a dataset are copied beside the table. Raises
    DiffalignError where there is nothing to write.
    """
    if out.suffix not in TABLES:
        raise DiffalignError(f"--out {out}: name a file that ends in {' or '.join(TABLES)}, or a folder for `judge`")
    if out.exists() and out.resolve() == gallery.log.resolve():
        raise DiffalignError(f"--out {out}: is the log of votes; choose another name")
    images = Images(gallery, out.parent, f"{out.stem}-images")
    known = [vote for vote in votes if vote.ranks and all(name in images for name in vote.images)]
    rows = [row for vote in known for row in _rows(vote, images, lists=out.suffix == ".jsonl")]
    if not rows:
        raise DiffalignError(f"{gallery.log}: no vote to write; skipped questions say nothing")
    write_rows(out, rows)
    return len(rows)


def _rows(vote: Vote, images: Images, lists: bool) -> Iterator[dict[str, Any]]:
    paths = [images.path(name) for name in vote.images]
    about = {"rater": vote.rater, "answer": vote.answer, "time": vote.time, "note": vote.note, "vote": vote.id}
    if vote.answer == "ranking" and lists:
        ranks = {"images": paths, "ranking": list(vote.ranks), "generators": list(vote.models)}
        yield {"prompt": vote.prompt, **ranks, **about}
        return
    for a, b in combinations(range(len(paths)), 2):
        sign = (vote.ranks[a] > vote.ranks[b]) - (vote.ranks[a] < vote.ranks[b])
        pair = {"image_a": paths[a], "image_b": paths[b], "choice": CHOICES[sign], "prompt": vote.prompt}
        yield {**pair, "model1": vote.models[a], "model2": vote.models[b], **about}


def write_judge_records(votes: Sequence[Vote], gallery: Gallery, out: Path) -> tuple[int, int]:
    """Write the scores of rubric questions as pairs.jsonl and ratings.jsonl of `judge`; return how many rows each has.

    A pair is two images of one vote with different scores. A rating is the mean of one rater's scores of an image, so
    `ratings` has a number for each rater. Scores are rounded to half points. Raises DiffalignError where no vote has
    scores.
    """
    images = Images(gallery, out, "images")
    pairs: list[dict[str, object]] = []
    given: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for vote in votes:
        for question, scores in vote.scores.items():
            rated = [
                (name, _level(s))
                for name, s in zip(vote.images, scores, strict=True)
                if s is not None and name in images
            ]
            for name, score in rated:
                given.setdefault((vote.prompt, question, name), {}).setdefault(vote.rater, []).append(score)
            for (better, high), (worse, low) in combinations(sorted(rated, key=lambda one: -one[1]), 2):
                if high > low:
                    pairs.append({
                        "prompt": vote.prompt, "dimension": question, "image_w": images.path(better),
                        "image_l": images.path(worse), "score_w": high, "score_l": low,
                    })  # fmt: skip
    if not given:
        raise DiffalignError(f"{gallery.log}: no vote has scores of a rubric; vote with --rubric first")
    ratings: list[dict[str, object]] = [
        {
            "prompt": prompt, "dimension": question, "image": images.path(name),
            "ratings": [sum(scores) / len(scores) for scores in raters.values()],
        }
        for (prompt, question, name), raters in given.items()
    ]  # fmt: skip
    return write_records(out / "pairs.jsonl", pairs), write_records(out / "ratings.jsonl", ratings)


def _level(score: float) -> float:
    return round(2 * score) / 2
