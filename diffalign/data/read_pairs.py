"""Read data made of pairs, row by row: Pick-a-Pic, HPDv3 and HPDv3++, a csv, `w/` and `l/`, two folders."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffalign.data.containers import tables_below
from diffalign.data.folder_metadata import folder_metadata
from diffalign.data.imported import ImportedGroup, SkippedRow, finite_number
from diffalign.data.prompts_beside import prompt_beside, prompt_within
from diffalign.data.tables import json_files, json_rows, table_rows, table_schema
from diffalign.errors import DiffalignError
from diffalign.files.images import SUFFIXES
from diffalign.files.paths import inside, own_file

Rows = Iterator[ImportedGroup | SkippedRow]
PICKAPIC = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
SPLITS = ("train", "validation", "test")
AXES = {"aes": "aesthetic", "tf": "text_following"}


def split_of(file: Path) -> str:
    """Return the split that a file's name begins with, as in validation-00000.parquet; train if it names none.

    A saved DatasetDict has a folder for each split.
    """
    if (file.parent.parent / "dataset_dict.json").is_file():
        return file.parent.name
    return next((split for split in SPLITS if file.name.startswith(split)), "train")


def read_pickapic(path: Path) -> Rows:
    """Read Pick-a-Pic v1 and v2: parquet or arrow files with caption, jpg_0, jpg_1 (encoded images), label_0, label_1.

    A folder's files are read in the order of their names; a name that begins with validation or test gives the split.
    Rows without a label and ties (0.5 each) are counted, not kept. Columns as in diffusers' research_projects/diffusion_dpo
    and the data set's card (yuvalkirstain/pickapic_v2).
    """
    files = tables_below(path) if path.is_dir() else [path]
    if not files:
        raise DiffalignError(f"{path}: holds no .parquet file")
    for file in files:
        try:
            names = set(table_schema(file).names)
        except DiffalignError as error:
            yield SkippedRow(str(file), str(error).removeprefix(f"{file}: "))
            continue
        missing = [name for name in PICKAPIC if name not in names]
        if missing and names:
            yield SkippedRow(str(file), f"column {', '.join(missing)} is missing")
            continue
        more = [n for n in ("has_label", "are_different", "model_0", "model_1", "ranking_id") if n in names]
        split = split_of(file)
        for place, row in table_rows(file, [*PICKAPIC, *more]):
            where = f"{file}:{place.rpartition(' ')[2]}"
            yield SkippedRow(where, row) if isinstance(row, str) else _pickapic_row(row, where, split)


def _pickapic_row(row: dict[str, Any], where: str, split: str) -> ImportedGroup | SkippedRow:
    labels = (row["label_0"], row["label_1"])
    if row.get("has_label") is False or any(finite_number(label) is None for label in labels):
        return SkippedRow(where, "without a label", fault=False)
    if labels not in ((1, 0), (0, 1), (0.5, 0.5)):
        return SkippedRow(where, f"labels {labels[0]} and {labels[1]}; 1 and 0, 0 and 1, or 0.5 each are known")
    if labels == (0.5, 0.5):
        return SkippedRow(where, "ties", fault=False)
    if not isinstance(row["caption"], str) or not row["caption"].strip():
        return SkippedRow(where, "no caption")
    images = []
    for name in ("jpg_0", "jpg_1"):
        data = row[name].get("bytes") if isinstance(row[name], dict) else row[name]
        if not isinstance(data, bytes) or not data:
            return SkippedRow(where, f"{name} is empty")
        images.append(data)
    generators = tuple(str(row.get(f"model_{i}") or "unknown") for i in (0, 1))
    metadata = {"ranking_id": row["ranking_id"]} if row.get("ranking_id") is not None else {}
    return ImportedGroup(
        row["caption"].strip(), tuple(images), tuple(map(float, labels)), where, generators, split, metadata
    )


def read_hpdv3(path: Path) -> Rows:
    """Read HPDv3: JSON or JSON lines with prompt, path1 (preferred) and path2, relative to the file.

    Everything else in a row (confidence, choice_dist) becomes its metadata.
    """
    for file in _json_files(path):
        split = split_of(file)
        yield from _hpdv3_rows(file, file.parent, split, {})


def read_hpdv3pp(path: Path) -> Rows:
    """Read HPDv3++: the folder with train/, test/ and images/, or one file of train/ or test/.

    Paths are relative to the folder. The two axes lie in separate files, train_aes.json (aesthetics) and train_tf.json
    (text following), test_ likewise: each pair keeps its axis in its metadata, and naming one file reads its axis
    alone. The other files there belong to the training of the authors' reward model and are not read.
    """
    known = _axis_files(path)
    if not known:
        raise DiffalignError(f"{path}: holds none of HPDv3++'s files of pairs, such as train/train_aes.json")
    for file in known:
        yield from _hpdv3_rows(file, file.parent.parent, file.stem.partition("_")[0], {"axis": _axis(file)})


def is_hpdv3pp(path: Path) -> bool:
    """Return whether a folder or file looks like HPDv3++'s."""
    return bool(_axis_files(path))


def _axis_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path] if _axis(path) else []
    return [own_file(path, file) for file in sorted(path.glob("*/*.json")) if _axis(file)]


def _axis(file: Path) -> str | None:
    """Return the axis of a file of HPDv3++; None for another file."""
    split, _, name = file.stem.partition("_")
    return AXES.get(name) if split == file.absolute().parent.name and split in SPLITS else None


def _hpdv3_rows(file: Path, root: Path, split: str, facts: dict[str, Any]) -> Rows:
    for where, row in json_rows(file):
        if isinstance(row, str):
            yield SkippedRow(where, row)
            continue
        prompt = row.get("prompt") or row.get("caption")
        if not isinstance(prompt, str) or not prompt.strip():
            yield SkippedRow(where, "no prompt")
            continue
        paths = _paths(root, row, ("path1", "path2"))
        if isinstance(paths, str):
            yield SkippedRow(where, paths)
            continue
        metadata = {
            k: v for k, v in row.items() if k not in ("prompt", "caption", "path1", "path2", "model1", "model2")
        }
        models = tuple(str(row.get(f"model{i}") or "unknown") for i in (1, 2))
        yield ImportedGroup(prompt.strip(), paths, (1.0, 0.0), where, models, split, {**metadata, **facts})


def read_two_folders(winners: Path, losers: Path) -> Rows:
    """Read images of equal stem. The caption of a.png is in a.txt beside the winner, beside the loser, or one folder
    up, or in the metadata file of one of the two folders.
    """
    for folder in (winners, losers):
        if not folder.is_dir():
            raise DiffalignError(f"{folder}: no such folder")
    listed = [folder_metadata(folder, None)[0] for folder in (winners, losers)]
    others = {p.stem: p for p in losers.iterdir() if p.suffix.lower() in SUFFIXES}
    for winner in sorted(p for p in winners.iterdir() if p.suffix.lower() in SUFFIXES):
        loser = others.pop(winner.stem, None)
        try:
            for folder, image in ((winners, winner), (losers, loser)):
                if image is not None:
                    own_file(folder, image)
        except DiffalignError as error:
            yield SkippedRow(str(winner), str(error))
            continue
        beside = [prompt_beside(folder / winner.name) for folder in (winners, losers, winners.parent)]
        rows = [found[image] for found, image in zip(listed, (winner, loser), strict=True) if image in found]
        stated = [prompt for prompt, _ in beside] + [row.prompt for row in rows]
        caption = next((prompt for prompt in stated if prompt), None) or prompt_within(winner)
        fault = next((fault for _, fault in beside if fault), f"write it into {winner.stem}.txt beside it")
        if loser is None:
            yield SkippedRow(str(winner), f"no image of the same name in {losers}")
        elif not caption:
            yield SkippedRow(str(winner), f"no caption; {fault}")
        else:
            facts = next((row.facts for row in rows if row.facts), {})
            yield ImportedGroup(caption, (winner, loser), (1.0, 0.0), str(winner), metadata=facts)
    for stem in sorted(others):
        yield SkippedRow(str(others[stem]), f"no image of the same name in {winners}")


def read_w_l(path: Path) -> Rows:
    """Read a folder with the winners in w/ and the losers in l/."""
    yield from read_two_folders(inside(path, "w"), inside(path, "l"))


def _json_files(path: Path) -> list[Path]:
    files = json_files(path) if path.is_dir() else [path]
    if not files:
        raise DiffalignError(f"{path}: holds no .json or .jsonl file")
    return files


def _paths(folder: Path, row: dict[str, Any], names: tuple[str, ...]) -> tuple[Path, ...] | str:
    """Return the files that a row names, or what is wrong with one. They are opened later."""
    found = []
    for name in names:
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            return f"{name} is empty"
        try:
            found.append(inside(folder, value.strip()))
        except DiffalignError as error:
            return str(error)
    return tuple(found)
