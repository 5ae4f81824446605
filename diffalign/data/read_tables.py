"""Read tables of pairs and of ranked images: csv, tsv, JSON, JSON lines or parquet, with paths or with the images.

A row is one of these, with a prompt:

    winner, loser                    or chosen and rejected, the form of TRL
    image_a, image_b, choice         a, b or tie, the form of `score --labels`
    image_0, image_1, label          0 or 1: the number of the preferred image
    image1, image2, and votes        weighted_results_image1_..., votes_image1: who has more is preferred
    images or generations, and preference or ranking    lists; rank 1 is the best
"""

import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from diffalign.data.imported import ImportedGroup, SkippedRow, finite_number, vote_shares_of_ranks
from diffalign.data.prompts_beside import prompt_beside, prompt_within
from diffalign.data.read_pairs import split_of
from diffalign.data.tables import COLUMNS, Row, column_for, json_object, no_column, table_rows
from diffalign.errors import DiffalignError
from diffalign.files.paths import inside, own_files
from diffalign.rewards.facts import KEYS, geneval_facts

Rows = Iterator[ImportedGroup | SkippedRow]
Image = bytes | Path
LISTS = ("images", "generations")
CHOICES = {"a": (1.0, 0.0), "b": (0.0, 1.0), "tie": (0.5, 0.5)}
NUMBERED = {"image_0": 0, "image1": 1}
"""Column of the first image -> the number that a label gives it."""
VOTES = ("votes_image{}", "weighted_results_image{}_preference", "weighted_results_image{}")


def is_table_of_pairs(names: Iterable[str]) -> bool:
    """Return whether these columns are of a form that `read_table` reads."""
    names = list(names)
    pair = column_for("winner", names) and column_for("loser", names)
    choice = column_for("a", names) and column_for("b", names)
    ranked = any(n in names for n in LISTS) and ("preference" in names or "ranking" in names)
    return bool(pair or choice or ranked)


def read_table(path: Path) -> Rows:
    """Read a table of pairs or of ranked images; files are relative to it and below its folder.

    Raises DiffalignError if the first row has none of the known forms.
    """
    for file in tables_of(path):
        split = split_of(file)
        first = True
        for where, row in tar_rows(file) if file.suffix == ".tar" else table_rows(file):
            if isinstance(row, str):
                yield SkippedRow(where, row)
                continue
            if first and not is_table_of_pairs(row):
                missing = next((m for m in ("winner", "loser") if column_for(m, row) is None), "winner")
                raise DiffalignError(f"{file}:1: {no_column(missing, row)}")
            first = False
            try:
                yield _group(row, where, file.parent, split)
            except DiffalignError as error:
                yield SkippedRow(where, str(error))


def tables_of(path: Path) -> list[Path]:
    """Return a file, or a folder's parquet or tar files in the order of their names, or else its JSON files."""
    if not path.is_dir():
        return [path]
    found = own_files(path, "**/*.parquet", "**/*.tar")
    found = found or own_files(path, "*.json", "*.jsonl")
    if not found:
        raise DiffalignError(f"{path}: holds no .parquet, .tar, .json or .jsonl file")
    return found


def tar_rows(path: Path) -> Iterator[tuple[str, Row | str]]:
    """Yield the groups of a webdataset export of ours: <group>.json, then <group>.<name> of each of its `images`."""
    where = ""
    row: Row | str = {}
    missing: list[str] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                data = tar.extractfile(member) if member.isfile() else None
                if data is None:
                    continue
                if member.name.endswith(".json"):
                    if missing:
                        yield where, f"{missing[0]} is not in the file"
                    where, stem = f"{path}:{member.name}", member.name.removesuffix(".json")
                    row, missing = json_object(data.read().decode("utf-8", "replace")), []
                    if isinstance(row, str):
                        yield where, row
                    elif isinstance(row.get("images"), list):
                        missing = [f"{stem}.{name}" for name in row["images"]]
                        row["images"] = [f"{stem}.{name}" for name in row["images"]]
                elif member.name in missing and isinstance(row, dict):
                    missing.remove(member.name)
                    row["images"] = [data.read() if name == member.name else name for name in row["images"]]
                    if not missing:
                        yield where, row
    except (tarfile.TarError, OSError, EOFError) as error:
        yield str(path), f"not a complete tar file ({error})"
        return
    if missing:
        yield where, f"{missing[0]} is not in the file"


def _group(row: dict[str, Any], where: str, folder: Path, split: str) -> ImportedGroup | SkippedRow:
    """Return the row's group. Raises DiffalignError with what is wrong."""
    many = next((n for n in LISTS if isinstance(row.get(n), list)), None)
    if many is not None:
        images = tuple(_image(folder, value, f"{many}[{i}]") for i, value in enumerate(row[many]))
        preference = _of_list(row, len(images))
        used = {many, "preference", "ranking"}
    elif column_for("winner", row) and column_for("loser", row):
        names = [str(column_for(meaning, row)) for meaning in ("winner", "loser")]
        images = tuple(_image(folder, row[n], meaning) for n, meaning in zip(names, ("winner", "loser"), strict=True))
        preference, used = (1.0, 0.0), set(names)
    else:
        names = [str(column_for(meaning, row)) for meaning in ("a", "b")]
        preference = _of_choice(row, names[0])
        if preference == (0.5, 0.5):
            return SkippedRow(where, "ties", fault=False)
        images = tuple(_image(folder, row[n], n) for n in names)
        used = {*names, str(column_for("choice", row))}
    if len(images) == 2 and images[0] == images[1]:
        return SkippedRow(where, "the two images are the same")
    prompt = _prompt(row, images)
    if not prompt:
        return SkippedRow(where, "no prompt")
    split = row["split"].strip() if isinstance(row.get("split"), str) and row["split"].strip() else split
    return ImportedGroup(prompt, images, preference, where, _generators(row, len(images)), split, _rest(row, used))


def _image(folder: Path, value: Any, name: str) -> Image:
    """Return the image of a cell: bytes, a struct with bytes, or a file below the folder."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes) and data:
        return data
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str) or not path.strip():
        raise DiffalignError(f"{name} is empty")
    return inside(folder, path.strip())


def _of_choice(row: dict[str, Any], first: str) -> tuple[float, float]:
    """Return the preference of a choice, a label or a count of votes."""
    for votes in VOTES:
        one, two = (finite_number(row.get(votes.format(i))) for i in (1, 2))
        if one is not None and two is not None:
            return (0.5, 0.5) if one == two else (1.0, 0.0) if one > two else (0.0, 1.0)
    name = column_for("choice", row)
    if name is None:
        raise DiffalignError(no_column("choice", row))
    value = str(row[name]).strip().lower().removesuffix(".0")
    start = NUMBERED.get(first)
    known = (
        CHOICES if start is None else {str(start): (1.0, 0.0), str(start + 1): (0.0, 1.0), "0.5": (0.5, 0.5), **CHOICES}
    )
    if value not in known:
        raise DiffalignError(f"{name} {row[name]!r}; one of {', '.join(known)}")
    return known[value]


def _of_list(row: dict[str, Any], images: int) -> tuple[float, ...]:
    name = "preference" if row.get("preference") is not None else "ranking"
    values = row.get(name)
    if name == "preference" and not values:
        return ()  # nobody preferred anything, which is not a fault
    if not isinstance(values, list) or len(values) != images or images < 2:
        raise DiffalignError(f"{name} must have a number for each of at least two images")
    numbers = [n for n in map(finite_number, values) if n is not None]
    if len(numbers) < images:
        raise DiffalignError(f"{name} {values}: no numbers")
    if name == "ranking":
        return vote_shares_of_ranks(numbers)
    if not all(0 <= n <= 1 for n in numbers):
        raise DiffalignError(f"preference out of range: {values}; it lies in [0, 1]")
    return tuple(numbers)


def _prompt(row: dict[str, Any], images: tuple[Image, ...]) -> str | None:
    name = column_for("prompt", row)
    value = row.get(name) if name else None
    if name is not None:
        return value.strip() or None if isinstance(value, str) else None
    files = [image for image in images if isinstance(image, Path)]
    return next((p for file in files if (p := prompt_beside(file)[0] or prompt_within(file))), None)


def _generators(row: dict[str, Any], images: int) -> tuple[str, ...]:
    given = row.get("generators")
    return tuple(map(str, given)) if isinstance(given, list) and len(given) == images else ()


def _rest(row: dict[str, Any], used: set[str]) -> dict[str, Any]:
    """Return what else stands in a row of a table without images, as the group's metadata."""
    plain = (*COLUMNS["prompt"], "split", "generators", "seeds", "scores", "metadata", "group_id")
    plain += (*used, *KEYS)
    facts = {k: v for k, v in row.items() if k not in plain and isinstance(v, str | int | float) and v != ""}
    return facts | geneval_facts(row)
