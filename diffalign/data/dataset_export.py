"""Export a dataset in formats that other code reads: one row a prompt, Pick-a-Pic's columns, webdataset."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from diffalign.data.dataset import ImageRow, PreferenceDataset
from diffalign.data.dataset_card import write_card
from diffalign.data.schema import GroupRow
from diffalign.data.writer import parquet_writer
from diffalign.draws import draw
from diffalign.errors import DiffalignError
from diffalign.files import replacing
from diffalign.files.paths import member_name, plain_name

if TYPE_CHECKING:
    from datasets import Features

GROUPS_PER_FILE = 1000
ROWS_PER_GROUP = 50
TYPED_BY = 5
"""Samples from which `datasets` reads the columns of a webdataset."""
SUFFIXES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp"}


def export(dataset: PreferenceDataset, out: Path, form: str, pairs: str = "best_worst") -> dict[str, int]:
    """Write `dataset` in another format below `out`, with a card; return how many rows each split has.

    form: `rows`, `pickapic` or `webdataset`. pairs (pickapic only): `best_worst`, one pair a group, or `all` pairs with
    a strict preference. Groups that ranking dropped and images that do not count are left out.
    """
    if form not in FORMS:
        raise DiffalignError(f"--format {form}: unknown; there are {', '.join(FORMS)}")
    if pairs not in ("best_worst", "all"):
        raise DiffalignError(f"--pairs {pairs}: unknown; best_worst or all")
    if any(out.glob("data/*")):
        raise DiffalignError(f"{out} holds data already; choose another folder")
    scores = StoredScores(dataset)
    splits, dropped = dataset.column("split"), dataset.column("dropped")
    counts = {}
    for split in sorted({plain_name(split, f"{dataset.folder}: split") for split in splits}):
        groups = [i for i, s in enumerate(splits) if s == split and not dropped[i]]
        files = max(1, math.ceil(len(groups) / GROUPS_PER_FILE))
        counts[split] = 0
        for n in range(files if groups else 0):
            some = groups[n * GROUPS_PER_FILE : (n + 1) * GROUPS_PER_FILE]
            counts[split] += FORMS[form](dataset, scores, some, out / "data", f"{split}-{n:05d}-of-{files:05d}", pairs)
    features = webdataset_features(out, list(scores.values))._to_yaml_list() if form == "webdataset" else []
    write_card(dataset, out, form, counts, features)
    return counts


class StoredScores:
    """Every column of every reward, by image."""

    def __init__(self, dataset: PreferenceDataset) -> None:
        self.dataset = dataset
        names = [f"{reward}.{column}" for reward in dataset.rewards() for column in dataset.score_columns(reward)]
        self.values = {name: dataset.score_array(name) for name in names}

    def of(self, group: int, members: list[int]) -> dict[str, list[float | None]]:
        """Return column -> values of these images of a group; None where there is no score."""
        rows = np.full(len(members), group)
        at = self.dataset.image_index.find(rows, np.array(members, dtype=np.int64))
        return {name: [float(v) if math.isfinite(v) else None for v in all_[at]] for name, all_ in self.values.items()}


def _rows(dataset: PreferenceDataset, scores: StoredScores, groups: list[int], out: Path, name: str, pairs: str) -> int:
    """Write one row a prompt; images, preference, scores, generators and seeds are lists of equal length."""
    from datasets import Features, Image, List, Value

    features = Features(
        {
            "group_id": Value("string"),
            "prompt": Value("string"),
            "images": List(Image()),
            "preference": List(Value("float32")),
            "scores": {name: List(Value("float32")) for name in scores.values} or Value("null"),
            "generators": List(Value("string")),
            "seeds": List(Value("int64")),
            "metadata": Value("string"),
            **({"condition": Image()} if len(dataset.condition_index) else {}),
        }
    )

    def rows() -> Iterator[dict[str, Any]]:
        for i in groups:
            row = dataset.group(i)
            images = dataset.images(row["group_id"])
            yield {
                "group_id": row["group_id"],
                "prompt": row["prompt"],
                "images": [{"bytes": image.data, "path": None} for image in images],
                "preference": row["preference"] or [],
                "scores": scores.of(i, [image.index for image in images]) or None,
                "generators": [image.generator for image in images],
                "seeds": [image.seed for image in images],
                "metadata": json.dumps(row["metadata"], sort_keys=True),
                **_condition(dataset, row["group_id"]),
            }

    return _write_parquet(out / f"{name}.parquet", features.arrow_schema, rows())


def _condition(dataset: PreferenceDataset, group_id: str) -> dict[str, Any]:
    """Return the column of the group's condition image, if the dataset has any."""
    if not len(dataset.condition_index):
        return {}
    found = dataset.condition(group_id)
    return {"condition": None if found is None else {"bytes": found.data, "path": None}}


def _pickapic(
    dataset: PreferenceDataset, scores: StoredScores, groups: list[int], out: Path, name: str, pairs: str
) -> int:
    """Write Pick-a-Pic's columns, one row a pair. The order of the two images is random, so the label gives nothing
    away.
    """
    schema = pa.schema(
        [
            ("are_different", pa.bool_()), ("best_image_uid", pa.string()), ("caption", pa.string()),
            ("has_label", pa.bool_()), ("image_0_uid", pa.string()), ("image_1_uid", pa.string()),
            ("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64()), ("label_1", pa.float64()),
            ("model_0", pa.string()), ("model_1", pa.string()), ("num_example_per_prompt", pa.int64()),
            ("ranking_id", pa.int64()),
        ]
    )  # fmt: skip

    def rows() -> Iterator[dict[str, Any]]:
        for i in groups:
            row = dataset.group(i)
            images = dataset.images(row["group_id"])
            found = list(strict_pairs(row["preference"] or [], pairs))
            for number, pair in enumerate(found):
                # Seeded by group and pair, so that an export can be repeated.
                swap = bool(draw(0, "export", group=row["group_id"], member=number).integers(2))
                winner, loser = (images[k] for k in pair)
                yield _pair_row(row, (loser, winner) if swap else (winner, loser), swap, len(found), i)

    return _write_parquet(out / f"{name}.parquet", schema, rows())


def strict_pairs(preference: list[float], pairs: str) -> Iterator[tuple[int, int]]:
    """Yield (better, worse) positions: of the best and the worst image, or of all pairs; none that are tied.

    An image without a preference (NaN) is in no pair.
    """
    known = [n for n, value in enumerate(preference) if value is not None and math.isfinite(value)]
    if len(known) < 2:
        return
    if pairs == "best_worst":
        best, worst = (decide(known, key=lambda n: preference[n]) for decide in (max, min))
        if preference[best] > preference[worst]:
            yield best, worst
        return
    for a, b in combinations(known, 2):
        if preference[a] != preference[b]:
            yield (a, b) if preference[a] > preference[b] else (b, a)


def _pair_row(
    row: GroupRow, images: tuple[ImageRow, ImageRow], swapped: bool, count: int, group: int
) -> dict[str, Any]:
    uids = [f"{image.group_id}-{image.index}" for image in images]
    return {
        "are_different": True,
        "best_image_uid": uids[1 if swapped else 0],
        "caption": row["prompt"],
        "has_label": True,
        "num_example_per_prompt": count,
        "ranking_id": group,
        **{f"image_{k}_uid": uid for k, uid in enumerate(uids)},
        **{f"jpg_{k}": image.data for k, image in enumerate(images)},
        **{f"label_{k}": float((k == 1) == swapped) for k in (0, 1)},
        **{f"model_{k}": image.generator for k, image in enumerate(images)},
    }


def _webdataset(
    dataset: PreferenceDataset, scores: StoredScores, groups: list[int], out: Path, name: str, pairs: str
) -> int:
    """Write a tar of <group>.json and <group>.<index>.png, without times or owners: equal data give equal bytes.

    `datasets` gives every key of the JSON one type, so metadata, which may hold anything, is JSON text, as in `rows`.
    A group's id is in its record; in the members' names it is escaped.
    """
    with replacing(out / f"{name}.tar") as part, tarfile.open(part, "w") as tar:
        for i in _fullest_first(dataset, scores, groups):
            row = dataset.group(i)
            images = dataset.images(row["group_id"])
            key = member_name(row["group_id"])
            record = {
                "group_id": row["group_id"],
                "prompt": row["prompt"],
                "preference": row["preference"] or [],
                "scores": scores.of(i, [image.index for image in images]) or None,
                "images": [f"{image.index}.{suffix(image.data)}" for image in images],
                "generators": [image.generator for image in images],
                "seeds": [image.seed for image in images],
                "metadata": json.dumps(row["metadata"], sort_keys=True),
            }
            _add(tar, f"{key}.json", json.dumps(record, sort_keys=True).encode())
            for image in images:
                _add(tar, f"{key}.{image.index}.{suffix(image.data)}", image.data)
    return len(groups)


def _fullest_first(dataset: PreferenceDataset, scores: StoredScores, groups: list[int]) -> list[int]:
    """Return the groups with the `TYPED_BY` fullest ones first: `datasets` takes columns and types from these."""
    ids = dataset.column("group_id")

    def fullness(i: int) -> tuple[int, int, int]:
        members = dataset.members(ids[i])
        known = sum(value is not None for values in scores.of(i, members).values() for value in values)
        return len(members), len(dataset.column("preference")[i] or []), known

    first = sorted(groups, key=fullness, reverse=True)[:TYPED_BY]
    return [*first, *(i for i in groups if i not in first)]


def webdataset_features(out: Path, rewards: list[str]) -> Features:
    """Return the columns of a webdataset export as `datasets` names them, those that only some groups have included.

    rewards: the names of score columns.
    """
    from datasets import Features, Image, List, Value

    names: set[str] = set()
    for path in (out / "data").glob("*.tar"):
        with tarfile.open(path) as tar:
            names |= {name.rpartition("/")[2].partition(".")[2] for name in tar.getnames()}
    record = {
        "prompt": Value("string"),
        "preference": List(Value("float64")),
        "scores": {name: List(Value("float64")) for name in rewards} or Value("null"),
        "images": List(Value("string")),
        "generators": List(Value("string")),
        "seeds": List(Value("int64")),
        "metadata": Value("string"),
    }
    images = sorted(names - {"json"}, key=lambda name: (int(name.split(".")[0]), name))
    key = {"__key__": Value("string"), "__url__": Value("string")}
    return Features({"json": record, **{name: Image() for name in images}, **key})


def suffix(data: bytes) -> str:
    """Return the file suffix of an encoded image, by its first bytes."""
    return next((name for start, name in SUFFIXES.items() if data.startswith(start)), "img")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def _write_parquet(path: Path, schema: pa.Schema, rows: Iterator[dict[str, Any]]) -> int:
    """Write rows as a stream; at most 50 are in memory."""
    pending: list[dict[str, Any]] = []
    count = 0
    with parquet_writer(path, schema) as writer:
        for row in rows:
            pending.append(row)
            count += 1
            if len(pending) == ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(pending, schema=schema))
                pending = []
        writer.write_table(pa.Table.from_pylist(pending, schema=schema))
    return count


Writer = Callable[[PreferenceDataset, StoredScores, list[int], Path, str, str], int]
FORMS: dict[str, Writer] = {"rows": _rows, "pickapic": _pickapic, "webdataset": _webdataset}
