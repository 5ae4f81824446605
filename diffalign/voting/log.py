"""The log of votes: JSON lines that are only ever appended, each on the disk before the next pair is shown.

    {"id": "5f0c...", "time": "2026-03-01T20:15:04.120+00:00", "rater": "anna", "prompt": "a red fox",
     "images": ["g00012/3", "g00012/0"], "models": ["tuned", "base"], "answer": "left", "ranking": [],
     "scores": {"alignment": [4, 2]}, "note": "", "repeat_of": null, "asked_by": "balanced", "seconds": 2.4}
    {"id": "77aa...", "time": "...", "rater": "anna", "undo": "5f0c..."}

Lists follow the order on the screen, left to right. An undo is an entry too: the vote that it names no longer counts.
Images are named as `diffalign score` names them: `group/index` in a dataset folder, else by their path relative to the
log's folder. The log of a dataset lies in its folder.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias, get_args

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from diffalign.errors import DiffalignError, brief
from diffalign.files import make_folder, read_json_lines
from diffalign.files.parse import parse_json
from diffalign.files.paths import is_plain_name

VOTES_FILE = "votes.jsonl"
"""The log of a dataset, in its folder."""

Answer: TypeAlias = Literal["left", "right", "tie", "both_bad", "skip", "ranking"]
ANSWERS: tuple[Answer, ...] = get_args(Answer)

EVERYBODY = "human"
"""The votes of all raters together, where a rater or a source is named: nobody votes under this name."""
DEFAULT_RATER = "me"
"""The name of a person who gives none."""

BEGINNING = b'{"id": "'
"""Of every line."""
LONGEST_NOTE = 2_000
"""Characters of a note."""


@dataclass(frozen=True)
class Vote:
    """One answer of one person. Lists follow the order on the screen, left to right.

    id: unique; a vote that is sent twice counts once. time: UTC, ISO 8601. models: the generator, or the name of the
    folder, behind each image. answer: `left` and `right` choose one of two; `tie` and `both_bad` prefer neither; `skip`
    says nothing; `ranking` gives each image its rank in `ranking`: 1 is the best, and images may share a rank. scores:
    rubric question -> a score from 1 to 5 for each image, None where none was given. repeat_of: the id of the rater's
    earlier vote that this one repeats. asked_by: the sampler that chose the images. seconds: from shown to answered.
    """

    id: str
    time: str
    rater: str
    prompt: str
    images: tuple[str, ...]
    models: tuple[str, ...]
    answer: Answer
    ranking: tuple[int, ...] = ()
    scores: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    note: str = ""
    repeat_of: str | None = None
    asked_by: str = ""
    seconds: FiniteFloat | None = None

    def __post_init__(self) -> None:
        """Raise DiffalignError where the parts do not fit each other."""
        count = len(self.images)
        pair, ranked = self.answer in ("left", "right"), self.answer == "ranking"
        if count < 2 or len(set(self.images)) < count:
            raise DiffalignError(f"vote {self.id!r}: at least two images are needed, and no image twice")
        if len(self.models) != count or any(len(given) != count for given in self.scores.values()):
            raise DiffalignError(f"vote {self.id!r}: models and scores need an entry for each of the {count} images")
        if pair and count != 2:
            raise DiffalignError(f"vote {self.id!r}: {self.answer} chooses one of two images, not of {count}")
        if len(self.ranking) != (count if ranked else 0) or any(not 1 <= rank <= count for rank in self.ranking):
            raise DiffalignError(f"vote {self.id!r}: a ranking, and no other answer, has a rank from 1 for each image")
        if any(score is not None and not 1 <= score <= 5 for given in self.scores.values() for score in given):
            raise DiffalignError(f"vote {self.id!r}: scores are numbers from 1 to 5")
        if len(self.note) > LONGEST_NOTE:
            raise DiffalignError(f"vote {self.id!r}: the note has more than {LONGEST_NOTE} characters")

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each image, 1 is the best, equal for images of which none is preferred; () for a skipped one."""
        of_pair: dict[str, tuple[int, ...]] = {"left": (1, 2), "right": (2, 1), "skip": (), "ranking": self.ranking}
        return of_pair.get(self.answer, (1,) * len(self.images))


@dataclass(frozen=True)
class Undo:
    """An entry that takes back the vote `undo` of the same rater."""

    id: str
    time: str
    rater: str
    undo: str


Entry: TypeAlias = Vote | Undo
_VOTE, _UNDO = TypeAdapter(Vote), TypeAdapter(Undo)


def check_rater(name: str, taken: Iterable[str] = ()) -> str:
    """Return a rater's name. It is the name of a source beside the rewards, so it is plain, without dots, and not `taken`.

    Raises DiffalignError for another one.
    """
    if not is_plain_name(name) or "." in name:
        raise DiffalignError(f"rater {name[:60]!r}: use letters, digits, `_` and `-`")
    if name.lower() == EVERYBODY:
        raise DiffalignError(
            f"rater {name!r}: stands for the votes of all; choose another one, such as {DEFAULT_RATER}"
        )
    if name in taken:
        raise DiffalignError(f"rater {name!r}: a reward has this name already; choose another one")
    return name


def line_of(entry: Entry) -> str:
    """Return an entry as its line in the log."""
    return json.dumps(asdict(entry), allow_nan=False) + "\n"


def read_entries(path: Path) -> list[Entry]:
    """Return the entries of a log in their order; [] if there is no file.

    A last line that a kill left unfinished is skipped. Raises DiffalignError for another line that is no entry.
    """
    rows = read_json_lines(path, needs=("id", "rater"))
    return [_entry(row, f"{path}: entry {row['id']!r}") for row in rows]


def effective(entries: Iterable[Entry]) -> list[Vote]:
    """Return the votes that count, in the order in which they were given: without those that were taken back."""
    found: dict[str, Vote] = {}
    taken_back: set[str] = set()
    for entry in entries:
        if isinstance(entry, Vote):
            if entry.id not in taken_back:
                found.setdefault(entry.id, entry)
        elif entry.undo in found and found[entry.undo].rater == entry.rater:
            del found[entry.undo]
            taken_back.add(entry.undo)
    return list(found.values())


def read_votes(path: Path) -> list[Vote]:
    """Return the votes of a log that count; see `read_entries` and `effective`."""
    return effective(read_entries(path))


def votes_of(votes: Iterable[Vote], rater: str) -> list[Vote]:
    """Return the votes of a rater, or all for `human`."""
    return [vote for vote in votes if rater in (EVERYBODY, vote.rater)]


def votes_digest(votes: Iterable[Vote]) -> str:
    """Return a short hash of votes: equal for the same votes in the same order."""
    return hashlib.blake2b("".join(map(line_of, votes)).encode(), digest_size=8).hexdigest()


class NotKept(DiffalignError):
    """An entry that could not be written, as on a full disk. The log is as it was."""


class VoteLog:
    """The open log: `append` returns when the entry is on the disk. One process writes it (`files.lock.writing_file`).

    Raises DiffalignError for a file that is no log; its bytes stay as they are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():
            raise DiffalignError(f"{path}: no file; name another place for the votes")
        self.entries = read_entries(path)
        make_folder(path.parent)
        _mend_end(path)
        self._stream = path.open("ab", buffering=0)  # what a full disk refuses must not be written later

    def append(self, entry: Entry) -> None:
        """Write an entry, and wait until it is on the disk. Raises NotKept where that fails."""
        end = os.fstat(self._stream.fileno()).st_size
        rest = line_of(entry).encode()
        try:
            while rest:
                rest = rest[self._stream.write(rest) :]
            os.fsync(self._stream.fileno())
        except OSError as error:
            os.ftruncate(self._stream.fileno(), end)  # half a line would damage the next one
            raise NotKept(f"{self.path}: not written ({brief(error)}); mend that, and answer again") from error
        self.entries.append(entry)

    def __enter__(self) -> "VoteLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def new_id() -> str:
    """Return an id for an entry."""
    return secrets.token_hex(8)


def now() -> str:
    """Return the time of an entry."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _entry(row: dict[str, Any], where: str) -> Entry:
    """Return the entry of a row. Raises DiffalignError, naming `where`."""
    if row["rater"] == EVERYBODY:  # the default before it was kept for the votes of all
        row = {**row, "rater": DEFAULT_RATER}
    try:
        return (_UNDO if "undo" in row else _VOTE).validate_python(row)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise DiffalignError(f"{where}: {key}: {first['msg']}; delete this line") from error


def _mend_end(path: Path) -> None:
    """Cut a last line that a kill left unfinished: nobody was told that it was kept. End a whole one that has no newline.

    Raises DiffalignError for a line that is no part of an entry: the file is not ours.
    """
    if not path.is_file():
        return
    last = path.read_bytes().rpartition(b"\n")[2]
    if not last:
        return
    ours = last[: len(BEGINNING)] == BEGINNING[: len(last)]
    try:
        row = parse_json(last)
        ours = isinstance(row, dict) and "id" in row
    except ValueError:
        row = None
    if not ours:
        raise DiffalignError(f"{path}: is no log of votes; name another place for them")
    if row is None:
        os.truncate(path, path.stat().st_size - len(last))
        return
    with path.open("ab") as stream:
        stream.write(b"\n")
