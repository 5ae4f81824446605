"""A preference in groups.parquet that is null, NaN or infinite: such an image is in no pair, and is counted."""

from __future__ import annotations

import itertools
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.dataset_export import export
from diffalign.data.dataset_summary import summarise_dataset
from diffalign.data.imported import ImportedGroup, write_imported
from diffalign.data.labels import labels
from diffalign.data.rank import rank
from helpers import pictures

PNG = [pictures.encoded(pictures.smooth(n, 24, 16), "PNG") for n in range(4)]
ABSENT = {"NaN": nan, "infinite": inf, "minus infinite": -inf, "null": None}


def rewritten(folder: Path, preferences: list[list[float | None]], without: tuple[str, ...] = ()) -> PreferenceDataset:
    """Return a dataset with these preferences in its groups.parquet. without: columns that older files lack."""
    write_imported([ImportedGroup(f"p{n}", tuple(PNG[: len(p)]), (), "x") for n, p in enumerate(preferences)], folder)
    path = folder / "groups.parquet"
    groups = pq.read_table(path)
    given = pa.array(preferences, type=pa.list_(pa.float32()))
    for name in ("preference", "human"):
        groups = groups.set_column(groups.schema.get_field_index(name), name, given)
    pq.write_table(groups.drop_columns([*without]), path)
    return PreferenceDataset(folder)


@pytest.mark.parametrize("bad", ABSENT.values(), ids=ABSENT)
@pytest.mark.parametrize("without", [(), ("human", "members", "dropped")], ids=["new", "older"])
def test_an_absent_preference_is_no_tie(tmp_path: Path, bad: float | None, without: tuple[str, ...]) -> None:
    dataset = rewritten(tmp_path / "data", [[1.0, bad, 0.0], [bad, bad], [0.0, 1.0], [bad, 0.5]], without)
    assert dataset.group(0)["preference"] == [1, 0] and dataset.members(dataset.group(0)["group_id"]) == [0, 2]
    assert dataset.split("train") == [0, 2]  # the others have fewer than two labels
    assert dataset.column("dropped")[1] == "fewer than two images have a label"
    assert [value.tolist() for value in labels(dataset, [0, 2])] == [[1, 0], [0, 1]]
    facts: dict[str, Any] = summarise_dataset(dataset)
    assert facts["without a label"] == "4 images" and facts["tied pairs"] == "0.0%"
    assert np.isfinite(dataset.score_array("human")).tolist() == [
        True,
        False,
        True,
        False,
        False,
        True,
        True,
        False,
        True,
    ]
    export(dataset, tmp_path / "out", "pickapic", "all")
    (path,) = (tmp_path / "out" / "data").glob("*.parquet")
    pairs = pq.read_table(path).to_pylist()
    assert sorted(row["caption"] for row in pairs) == ["p0", "p2"]


@pytest.mark.parametrize("form", ["rows", "webdataset"])
def test_the_export_holds_no_absent_label(tmp_path: Path, form: str) -> None:
    dataset = rewritten(tmp_path / "data", [[1.0, nan, 0.0], [nan, nan]])
    export(dataset, tmp_path / "out", form)
    (path,) = (p for p in (tmp_path / "out" / "data").iterdir())
    assert b"NaN" not in path.read_bytes()


def test_ranking_by_people_leaves_them_out_too(tmp_path: Path) -> None:
    dataset = rewritten(tmp_path / "data", [[1.0, inf, 0.0, 0.5]])
    rank(dataset, ["human"])
    again = PreferenceDataset(tmp_path / "data")
    assert again.members(again.group(0)["group_id"]) == [0, 2, 3] and again.group(0)["preference"] == [1, 0, 0.5]


def test_finite_preferences_are_not_touched(tmp_path: Path) -> None:
    given = [list(p) for p in itertools.permutations([0.0, 0.5, 1.0])] + [[], [0.5, 0.5]]
    dataset = rewritten(tmp_path / "data", [p or [0.0, 1.0] for p in given])
    assert dataset.column("members") == [None] * len(given) and dataset.column("dropped") == [None] * len(given)
    assert dataset.column("preference") == [p or [0.0, 1.0] for p in given]
