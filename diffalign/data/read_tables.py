"""Read tables of pairs and of ranked images: csv, tsv, JSON, JSON lines or parquet, with paths or with the images.

A row is one of these, with a prompt:

    winner, loser                    or chosen and rejected, the form of TRL (huggingface.co/docs/trl/dataset_formats), with
                                     images in data-is-better-together/open-image-preferences-v1-binarized; or img_better,
                                     img_worse (ImageRewardDB.py of THUDM/ImageRewardDB, config 8k_pair)
    image_a, image_b, choice         a, b or tie, the form of `score --labels`
    image_0, image_1, label          0 or 1: the number of the preferred image
    left_image, right_image, vote_type    leftvote, rightvote, tievote, bothbad_vote (card of TIGER-Lab/GenAI-Bench)
    image1, image2, and votes        who has more is preferred: votes_image1 (card of
                                     Rapidata/700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3, a third of its 2 million
                                     votes), weighted_results_image1_preference (Rapidata's later cards)
    images or generations, and preference or ranking    lists; rank 1 is the best; `generations` and `ranking` are those of
                                     ImageReward's training script, `image` and `rank` of ImageRewardDB's config 8k_group

model1, model2 (or model_0, model_1; left_model, right_model) name the generators.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.data.containers import TABLES, TARS, containers_below, kind_of
from diffalign.data.imported import ImportedGroup, LabelKind, SkippedRow, finite_number, preference_of
from diffalign.data.prompts_beside import prompt_beside, prompt_within
from diffalign.data.read_pairs import split_of
from diffalign.data.tables import COLUMNS, Row, column_for, json_files, no_column, table_kind, table_rows
from diffalign.data.webdataset import export_rows
from diffalign.errors import DiffalignError
from diffalign.files.facts import KEYS, geneval_facts
from diffalign.files.paths import inside, own_file

Rows = Iterator[ImportedGroup | SkippedRow]
Image = bytes | Path
LISTS = ("images", "generations", "image")
RANKS: dict[str, LabelKind] = {"preference": "preference", "ranking": "rank", "rank": "rank"}
"""Column with a label for each image of a list -> what it is."""
TIE = (0.5, 0.5)
CHOICES = {"a": (1.0, 0.0), "b": (0.0, 1.0), "tie": TIE}
CHOICES |= {"leftvote": CHOICES["a"], "rightvote": CHOICES["b"], "tievote": TIE, "bothbad_vote": TIE}
NUMBERED = {"image_0": 0, "image1": 1}
"""Column of the first image -> the number that a label gives it."""
MODELS = (("model_0", "model_1"), ("model1", "model2"), ("left_model", "right_model"))
VOTES = ("votes_image{}", "weighted_results_image{}_preference", "weighted_results_image{}")


def is_table_of_pairs(row: Mapping[str, object]) -> bool:
    """Return whether these columns are of a form that `read_table` reads; of lists, the value says that they are."""
    pair = column_for("winner", row) and column_for("loser", row)
    choice = column_for("a", row) and column_for("b", row)
    listed = "images" in row or "generations" in row or isinstance(row.get("image"), list)
    return bool(pair or choice or (listed and any(name in row for name in RANKS)))


def read_table(path: Path) -> Rows:
    """Read a table of pairs or of ranked images; files are relative to it and below its folder.

    Raises DiffalignError if the first row has none of the known forms.
    """
    for file in tables_of(path):
        split = split_of(file)
        first = True
        for where, row in export_rows(file) if kind_of(file) in TARS else table_rows(file):
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
    """Return a file, or a folder's parquet, arrow or tar files in the order of their names, or else its JSON files."""
    if not path.is_dir():
        return [path]
    found = [own_file(path, file) for file in containers_below(path) if kind_of(file) in (*TABLES, *TARS)]
    found = found or json_files(path) or csv_files(path)
    if not found:
        raise DiffalignError(f"{path}: holds no .parquet, .arrow, .tar, .json, .jsonl, .csv or .tsv file")
    return found


def csv_files(folder: Path) -> list[Path]:
    """Return the csv and tsv files of a folder, compressed ones too."""
    return [own_file(folder, file) for file in sorted(folder.iterdir()) if table_kind(file) in (".csv", ".tsv")]


@dataclass(frozen=True)
class Judged:
    """What a row says. images: (column, cell) of each; preference: of each, higher is better, () if nobody said.

    used: the columns that were read. skipped: why a choice between two images states no preference, "" if it does.
    """

    images: tuple[tuple[str, Any], ...]
    preference: tuple[float, ...]
    used: frozenset[str]
    skipped: str = ""


def judged(row: Row) -> Judged:
    """Return the images and the preference of a row in any of the known forms.

    Raises DiffalignError with what is wrong.
    """
    ranked = any(name in row for name in RANKS)
    many = next((n for n in LISTS if ranked and isinstance(row.get(n), list)), None)
    if many is not None:
        images = tuple((f"{many}[{i}]", value) for i, value in enumerate(row[many]))
        return Judged(images, _of_list(row, len(images)), frozenset({many, *RANKS}))
    if column_for("winner", row) and column_for("loser", row):
        names = [str(column_for(meaning, row)) for meaning in ("winner", "loser")]
        images = tuple((meaning, row[n]) for n, meaning in zip(names, ("winner", "loser"), strict=True))
        return Judged(images, (1.0, 0.0), frozenset(names))
    missing = [meaning for meaning in ("a", "b") if column_for(meaning, row) is None]
    if missing:
        raise DiffalignError(no_column("winner" if len(missing) == 2 else missing[0], row))
    names = [str(column_for(meaning, row)) for meaning in ("a", "b")]
    preference = _of_choice(row, names[0])
    skipped = "without a label" if preference is None else "ties" if preference == TIE else ""
    used = frozenset({*names, str(column_for("choice", row))})
    return Judged(tuple((n, row[n]) for n in names), preference or (), used, skipped)


def _group(row: Row, where: str, folder: Path, split: str) -> ImportedGroup | SkippedRow:
    """Return the row's group. Raises DiffalignError with what is wrong."""
    said = judged(row)
    if said.skipped:
        return SkippedRow(where, said.skipped, fault=False)
    images = tuple(_image(folder, value, name) for name, value in said.images)
    if len(images) == 2 and images[0] == images[1]:
        return SkippedRow(where, "the two images are the same")
    prompt = _prompt(row, images)
    if not prompt:
        return SkippedRow(where, "no prompt")
    split = row["split"].strip() if isinstance(row.get("split"), str) and row["split"].strip() else split
    name = column_for("condition", row)
    condition = _image(folder, row[name], name) if name is not None and row[name] not in (None, "") else None
    rest = _rest(row, {*said.used, *([name] if name else [])})
    generators = _generators(row, len(images))
    return ImportedGroup(prompt, images, said.preference, where, generators, split, rest, condition)


def _image(folder: Path, value: object, name: str) -> Image:
    """Return the image of a cell: bytes, a struct with bytes, or a file below the folder."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes) and data:
        return data
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str) or not path.strip():
        raise DiffalignError(f"{name} is empty")
    return inside(folder, path.strip())


def _of_choice(row: dict[str, Any], first: str) -> tuple[float, float] | None:
    """Return the preference of a choice, a label or a count of votes; None where nobody chose.

    Raises DiffalignError for another word or number.
    """
    voted = False
    for votes in VOTES:
        names = [votes.format(i) for i in (1, 2)]
        voted |= all(name in row for name in names)
        one, two = (finite_number(row.get(name)) for name in names)
        if one is not None and two is not None:
            return TIE if one == two else (1.0, 0.0) if one > two else (0.0, 1.0)
    name = column_for("choice", row)
    if name is None:
        if voted:
            return None
        raise DiffalignError(no_column("choice", row))
    value = str(row[name]).strip().lower().removesuffix(".0")
    if row[name] is None or value in ("", "nan"):
        return None
    start = NUMBERED.get(first.strip().lower())
    known = CHOICES if start is None else {str(start): (1.0, 0.0), str(start + 1): (0.0, 1.0), "0.5": TIE, **CHOICES}
    if value not in known:
        raise DiffalignError(f"{name} {row[name]!r}; one of {', '.join(known)}")
    return known[value]


def _of_list(row: dict[str, Any], images: int) -> tuple[float, ...]:
    name = next((n for n in RANKS if row.get(n) is not None), "preference")
    values = row.get(name)
    if name == "preference" and not values:
        return ()  # nobody preferred anything, which is not a fault
    if not isinstance(values, list) or len(values) != images or images < 2:
        raise DiffalignError(f"{name} must have a number for each of at least two images")
    return preference_of(values, RANKS[name])


def _prompt(row: dict[str, Any], images: tuple[Image, ...]) -> str | None:
    name = column_for("prompt", row)
    value = row.get(name) if name else None
    if name is not None:
        return value.strip() or None if isinstance(value, str) else None
    files = [image for image in images if isinstance(image, Path)]
    return next((p for file in files if (p := prompt_beside(file)[0] or prompt_within(file))), None)


def _generators(row: dict[str, Any], images: int) -> tuple[str, ...]:
    given = row.get("generators")
    pair = next((names for names in MODELS if images == 2 and all(row.get(name) for name in names)), None)
    if pair is not None:
        return tuple(str(row[name]) for name in pair)
    return tuple(map(str, given)) if isinstance(given, list) and len(given) == images else ()


def _rest(row: dict[str, Any], used: set[str]) -> dict[str, Any]:
    """Return what else stands in a row of a table without images, as the group's metadata."""
    plain = (*COLUMNS["prompt"], "split", "generators", "seeds", "scores", "metadata", "group_id")
    plain += (*used, *KEYS, *(name for names in MODELS for name in names))
    facts = {k: v for k, v in row.items() if k not in plain and isinstance(v, str | int | float) and v != ""}
    return facts | geneval_facts(row)
