"""Read data with groups of images: HPDv2, and imagefolder with metadata.jsonl."""

from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from diffalign.data.imported import ImportedGroup, SkippedRow, finite_number, vote_shares_of_ranks
from diffalign.data.tables import column_for, json_rows, table_rows
from diffalign.errors import DiffalignError
from diffalign.files.paths import inside, own_file

Rows = Iterator[ImportedGroup | SkippedRow]
# Columns of metadata.jsonl that mean something here; the others are a group's facts.
OWN = {"file_name", "prompt", "text", "group_id", "preference", "rank", "score", "split", "model"}
OWN |= {"chosen_file_name", "rejected_file_name"}
USUAL = {"prompt": "prompt", "image": "file_name", "winner": "chosen_file_name", "loser": "rejected_file_name"}


def read_hpdv2(path: Path) -> Rows:
    """Read HPDv2: train.json (file_path, human_preference: 1 for the preferred) and test.json (image_path, rank).

    Rank 1 is the best. Images lie in train/ and test/ beside the JSON, or directly beside it. A tied pair (no image, or
    both, preferred) is counted and not kept.
    """
    files = [path / f"{s}.json" for s in ("train", "test")] if path.is_dir() else [path]
    files = [own_file(file.parent, file) if path.is_dir() else file for file in files if file.is_file()]
    if not files:
        raise DiffalignError(f"{path}: holds neither train.json nor test.json")
    for file in files:
        for where, row in json_rows(file):
            yield SkippedRow(where, row) if isinstance(row, str) else _hpdv2_row(row, where, file)


def _hpdv2_row(row: dict[str, Any], where: str, file: Path) -> ImportedGroup | SkippedRow:
    names = row.get("file_path") or row.get("image_path")
    ranked = row.get("rank") is not None
    labels = row.get("rank") if ranked else row.get("human_preference")
    if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        return SkippedRow(where, "no prompt")
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(n, str) for n in names):
        return SkippedRow(where, "file_path or image_path must list at least two images")
    if not isinstance(labels, list) or len(labels) != len(names):
        return SkippedRow(
            where, f"{'rank' if ranked else 'human_preference'} must have {len(names)} values, one an image"
        )
    if not all(isinstance(x, int | float) and isfinite(x) and (ranked or x in (0, 1)) for x in labels):
        return SkippedRow(where, f"label out of range: {labels}")
    preference = vote_shares_of_ranks(list(labels)) if ranked else tuple(map(float, labels))
    if len(set(preference)) < 2:
        return SkippedRow(where, "ties", fault=False)
    images = []
    for name in names:
        try:
            tried = [inside(file.parent, str(Path(folder) / name)) for folder in (file.stem, ".")]
        except DiffalignError as error:
            return SkippedRow(where, str(error))
        images.append(next((p for p in tried if p.is_file()), tried[0]))
    return ImportedGroup(row["prompt"].strip(), tuple(images), preference, where, split=file.stem)


def metadata_files(folder: Path) -> list[Path]:
    """Return the names that the metadata of a folder may have."""
    return [folder / f"metadata{ending}" for ending in (".jsonl", ".csv", ".parquet")]


def read_imagefolder(path: Path) -> Rows:
    """Read a folder of images with metadata.jsonl (or .csv): file_name and text or prompt, one row an image.

    Rows with one group_id, or else with one prompt, are a group. `preference` in [0, 1], `rank` (1 is the best) or
    `score` (higher is better) orders them; a group with none of these is kept without a preference. Or one row a pair:
    chosen_file_name and rejected_file_name.
    """
    files = [own_file(path, p) for p in metadata_files(path) if p.is_file()] if path.is_dir() else [path]
    if not files:
        raise DiffalignError(f"{path}: holds neither metadata.jsonl nor metadata.csv")
    groups: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for where, row in _table(files[0]):
        if isinstance(row, str):
            yield SkippedRow(where, row)
            continue
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            yield SkippedRow(where, "no prompt or text")
        elif row.get("chosen_file_name") and row.get("rejected_file_name"):
            pair = [{"file_name": row[f"{side}_file_name"], "rank": n} for n, side in ((1, "chosen"), (2, "rejected"))]
            yield _folder_group(prompt.strip(), [(where, one) for one in pair], files[0].parent, row)
        elif not isinstance(row.get("file_name"), str):
            yield SkippedRow(where, "no file_name")
        else:
            row["prompt"] = prompt.strip()
            groups.setdefault(str(row.get("group_id") or row.get("prompt_id") or row["prompt"]), []).append(
                (where, row)
            )
    for rows in groups.values():
        if len({row["prompt"] for _, row in rows}) > 1:
            yield SkippedRow(rows[0][0], "the rows of this group_id have different prompts")
        else:
            yield _folder_group(rows[0][1]["prompt"], rows, files[0].parent, rows[0][1])


def _folder_group(
    prompt: str, rows: list[tuple[str, dict[str, Any]]], folder: Path, facts: dict[str, Any]
) -> ImportedGroup | SkippedRow:
    images: list[bytes | Path] = []
    for where, row in rows:
        if not isinstance(row["file_name"], str):
            return SkippedRow(where, f"{row['file_name']!r} is no file name")
        try:
            images.append(inside(folder, row["file_name"]))
        except DiffalignError as error:
            return SkippedRow(where, str(error))
    where = rows[0][0]
    preference: tuple[float, ...] = ()
    for name in ("preference", "rank", "score"):
        values = [finite_number(row.get(name)) for _, row in rows]
        known = [v for v in values if v is not None]
        if known and len(known) < len(values):
            return SkippedRow(where, f"{name} is missing, or no number, for some images of the group")
        if known:
            if name == "preference" and not all(0 <= v <= 1 for v in known):
                return SkippedRow(where, f"preference out of range: {known}; it lies in [0, 1]")
            ranks = known if name == "rank" else [-v for v in known]
            preference = tuple(known) if name == "preference" else vote_shares_of_ranks(ranks)
            break
    metadata = {k: v for k, v in facts.items() if k not in OWN}
    models = tuple(str(row.get("model") or "imported") for _, row in rows)
    return ImportedGroup(prompt, tuple(images), preference, where, models, str(facts.get("split") or "train"), metadata)


def _table(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield the rows of a metadata file: its image, prompt and pair under their usual names, empty cells left out."""
    for where, row in table_rows(path):
        if isinstance(row, str):
            yield where, row
            continue
        names = {column_for(meaning, row): name for meaning, name in USUAL.items()}
        yield (
            where,
            {names.get(k, k): v.strip() if isinstance(v, str) else v for k, v in row.items() if v not in ("", None)},
        )
