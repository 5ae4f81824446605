"""Read votes as the labels of `score --labels`: a log, a folder that holds one, or the name of a source."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.errors import DiffalignError
from diffalign.files.parse import parse_json
from diffalign.scoring.items import Item
from diffalign.voting.log import VOTES_FILE, Vote, read_votes, votes_of


def vote_rows(path: Path, items: Sequence[Item]) -> tuple[Path, list[tuple[str, dict[str, Any]]]] | None:
    """Return a log's folder, and (place, row) of each of its votes as a table of `images` and `ranking`; None for no log.

    path: the log, a folder with a `votes.jsonl`, or `human` or a rater's name, where no file has this name and the items
    come from one dataset folder. Raises DiffalignError for a name that nobody voted under.
    """
    if path.is_dir() and (path / VOTES_FILE).is_file():
        return path, _rows(path / VOTES_FILE, read_votes(path / VOTES_FILE))
    if path.is_file():
        return (path.parent, _rows(path, read_votes(path))) if _is_log(path) else None
    folders = {Path(item.name.removesuffix(f"/{item.key}")) for item in items if item.group is not None}
    if path.exists() or len(folders) != 1 or any(item.group is None for item in items):
        return None
    log = folders.pop() / VOTES_FILE
    votes = read_votes(log)
    own = votes_of(votes, str(path))
    if votes and not own:
        raters = ", ".join(sorted({vote.rater for vote in votes}))
        raise DiffalignError(f"--labels {path}: no such file, and nobody of this name in {log}; there are {raters}")
    return (log.parent, _rows(log, own)) if votes else None


def _is_log(path: Path) -> bool:
    """Return whether the first line of a file is an entry of a log of votes."""
    with path.open("rb") as stream:
        first = stream.readline(1_000_000)
    try:
        row = parse_json(first)
    except ValueError:
        return False
    return isinstance(row, dict) and {"id", "rater"} <= row.keys() and ("images" in row or "undo" in row)


def _rows(log: Path, votes: Sequence[Vote]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{log}: vote {vote.id}", {"images": list(vote.images), "ranking": list(vote.ranks), "prompt": vote.prompt})
        for vote in votes
        if vote.ranks
    ]
