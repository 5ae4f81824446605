"""Records about rated images: JSON lines, read with file and line, so that an error can name them.

    pairs.jsonl          {prompt, dimension, image_w, image_l, score_w, score_l, trace_w?, trace_l?}
    ratings.jsonl        {prompt, dimension, image, ratings: [...]}             several people's, for evaluation
    distributions.jsonl  {prompt, dimension, image, probabilities: [9], teacher}   what a teacher says

Further keys are allowed and ignored. Images are named relative to the file's folder and may not lie outside it.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from diffalign.data.tables import json_rows
from diffalign.errors import DiffalignError
from diffalign.files import replacing
from diffalign.files.paths import inside as below
from diffalign.judge.losses import HIGHEST, LEVELS, LOWEST

Record = TypeVar("Record")


@dataclass(frozen=True)
class RatedPair:
    """A better and a worse image of one prompt in one dimension, with their scores; traces: written reasons, if any."""

    prompt: str
    dimension: str
    images: tuple[Path, Path]
    scores: tuple[float, float]
    traces: tuple[str, str] | None


@dataclass(frozen=True)
class Rated:
    """An image and its ratings by people, in one dimension."""

    prompt: str
    dimension: str
    image: Path
    ratings: tuple[float, ...]

    @property
    def score(self) -> float:
        """The mean, without highest and lowest where there are three, as in the paper's test set; it need not be a level."""
        kept = sorted(self.ratings)[1:-1] if len(self.ratings) > 2 else self.ratings
        return sum(kept) / len(kept)


@dataclass(frozen=True)
class Taught:
    """An image and a teacher's distribution of its score."""

    prompt: str
    dimension: str
    image: Path
    probabilities: tuple[float, ...]


def read_pairs(path: Path) -> list[RatedPair]:
    """Read pairs.jsonl.

    Raises DiffalignError: no such file, no JSON, a key missing or wrong, an image outside the folder or absent.
    """
    return _read(path, _pair)


def read_ratings(path: Path) -> list[Rated]:
    """Read ratings.jsonl; errors as in `read_pairs`."""
    return _read(path, _rated)


def read_taught(path: Path) -> list[Taught]:
    """Read distributions.jsonl; errors as in `read_pairs`."""
    return _read(path, _taught)


def rated_images(pairs: Iterable[RatedPair]) -> list[Rated]:
    """Return each side of each pair by itself, its annotated score as the only rating; an image that recurs is there once."""
    found: dict[tuple[str, str, Path], Rated] = {}
    for pair in pairs:
        for image, score in zip(pair.images, pair.scores, strict=True):
            found.setdefault((pair.prompt, pair.dimension, image), Rated(pair.prompt, pair.dimension, image, (score,)))
    return list(found.values())


def write_records(path: Path, rows: Iterable[dict[str, object]]) -> int:
    """Write JSON lines, under another name until they are complete; return the number of rows."""
    count = 0
    with replacing(path) as part, part.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def inside(folder: Path, name: str, place: str, key: str) -> Path:
    """Return an image's file. Raises DiffalignError where it is outside the folder or absent."""
    try:
        path = below(folder, name)
    except DiffalignError as error:
        raise DiffalignError(f"{place}: {key} {name} lies outside {folder}; keep images beside the records") from error
    if not path.is_file():
        raise DiffalignError(f"{place}: {key} {name} is not in {folder}")
    return path


def _read(path: Path, parse: Callable[[dict[str, Any], str, Path], Record]) -> list[Record]:
    found = []
    if not path.is_file():
        raise DiffalignError(
            f"records {path}: no such file; docs/judge.md says what a line holds, and `diffalign testbed judge-data` makes "
            "some of the embedded world"
        )
    for place, row in json_rows(path):
        if isinstance(row, str):
            raise DiffalignError(f"{place}: {row}")
        found.append(parse(row, place, path.parent))
    if not found:
        raise DiffalignError(f"{path}: holds no record")
    return found


def _pair(row: dict[str, Any], place: str, folder: Path) -> RatedPair:
    better, worse = _level(row, "score_w", place), _level(row, "score_l", place)
    if better <= worse:
        raise DiffalignError(
            f"{place}: score_w {better:g} should be above score_l {worse:g}; swap the sides or drop a tie"
        )
    images = (
        inside(folder, _text(row, "image_w", place), place, "image_w"),
        inside(folder, _text(row, "image_l", place), place, "image_l"),
    )
    traces = None
    if "trace_w" in row or "trace_l" in row:
        traces = (_text(row, "trace_w", place), _text(row, "trace_l", place))
    return RatedPair(_text(row, "prompt", place), _text(row, "dimension", place), images, (better, worse), traces)


def _rated(row: dict[str, Any], place: str, folder: Path) -> Rated:
    ratings = _numbers(row, "ratings", place)
    if not ratings or any(not LOWEST <= r <= HIGHEST for r in ratings):
        raise DiffalignError(f"{place}: ratings {list(ratings)}: one at least, each from {LOWEST:g} to {HIGHEST:g}")
    image = inside(folder, _text(row, "image", place), place, "image")
    return Rated(_text(row, "prompt", place), _text(row, "dimension", place), image, ratings)


def _taught(row: dict[str, Any], place: str, folder: Path) -> Taught:
    q = _numbers(row, "probabilities", place)
    if len(q) != LEVELS or min(q, default=-1.0) < 0 or abs(sum(q) - 1) > 1e-3:
        raise DiffalignError(f"{place}: probabilities should be {LEVELS} numbers, none below 0, that sum to 1")
    image = inside(folder, _text(row, "image", place), place, "image")
    return Taught(_text(row, "prompt", place), _text(row, "dimension", place), image, tuple(x / sum(q) for x in q))


def _given(row: dict[str, Any], key: str, place: str) -> Any:
    if key not in row:
        raise DiffalignError(f"{place}: {key} is missing")
    return row[key]


def _text(row: dict[str, Any], key: str, place: str) -> str:
    value = _given(row, key, place)
    if not isinstance(value, str) or not value.strip():
        raise DiffalignError(f"{place}: {key} should be a text that is not empty, not {value!r}")
    return value


def _number(value: Any, key: str, place: str) -> float:
    # An integer of more than 308 digits is no float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e308 < value < 1e308:
        raise DiffalignError(f"{place}: {key} should be a number, not {value!r}")
    return float(value)


def _level(row: dict[str, Any], key: str, place: str) -> float:
    score = _number(_given(row, key, place), key, place)
    if not LOWEST <= score <= HIGHEST or score * 2 != round(score * 2):
        raise DiffalignError(
            f"{place}: {key} {score:g} is none of the levels 1, 1.5, ..., 5; round means to half points"
        )
    return score


def _numbers(row: dict[str, Any], key: str, place: str) -> tuple[float, ...]:
    values = _given(row, key, place)
    if not isinstance(values, list):
        raise DiffalignError(f"{place}: {key} should be a list of numbers, not {values!r}")
    return tuple(_number(value, key, place) for value in values)
