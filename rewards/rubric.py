"""Read rubrics: a text for each dimension that a judge rates. Ours are rubrics/*.txt; a file can replace or join them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffalign.errors import DiffalignError

FOLDER = Path(__file__).with_name("rubrics")
DIMENSIONS = ("alignment", "realism", "aesthetics", "plausibility")
"""Z-Reward's four: text-image alignment, realism, aesthetics, physical plausibility."""
LONGEST = 20_000
"""The most characters of a rubric: a longer file is hardly one, and every image would pay for its tokens."""


def load_rubrics(names: Sequence[str | Path] = DIMENSIONS, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return dimension -> rubric, in the order given. An entry is one of DIMENSIONS, NAME=FILE, or a FILE named like
    it.

    `alignment=my.txt` replaces ours. known: rubrics that take precedence over ours, such as a trained judge's own.
    Raises DiffalignError for an unknown name, a file without text, and a dimension given twice.
    """
    found: dict[str, str] = {}
    for entry in names:
        name, text = _read(str(entry).strip(), known or {})
        if name in found:
            raise DiffalignError(f"rubric {name!r} is given twice; leave one out")
        found[name] = text
    if not found:
        raise DiffalignError(f"no dimension is left to rate; ours are {', '.join(DIMENSIONS)}")
    return found


def _read(entry: str, known: Mapping[str, str]) -> tuple[str, str]:
    if entry in known:
        return entry, known[entry]
    if entry in DIMENSIONS:
        return entry, (FOLDER / f"{entry}.txt").read_text(encoding="utf-8").strip()
    name, equals, given = entry.partition("=")
    path = Path(given if equals else entry).expanduser()
    name = name.strip() if equals else path.stem
    if not name.replace("_", "").replace("-", "").isalnum():
        raise DiffalignError(f"rubric {entry!r}: a dimension's name has letters, digits, - and _ only; write NAME=FILE")
    if not path.is_file():
        raise DiffalignError(
            f"rubric {entry!r}: neither one of {', '.join(DIMENSIONS)} nor a file; write NAME or NAME=FILE"
        )
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise DiffalignError(f"rubric {entry!r}: {path} is not UTF-8 text ({error.reason})") from error
    if not text or len(text) > LONGEST:
        raise DiffalignError(f"rubric {entry!r}: {path} has {len(text)} characters; 1 to {LONGEST} are needed")
    return name, text
