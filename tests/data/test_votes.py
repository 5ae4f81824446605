"""Votes as a source of a dataset: ranking and labels read them, of all raters or of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.dataset_summary import summarise_dataset
from diffalign.data.labels import labels
from diffalign.errors import DiffalignError
from diffalign.voting.log import Undo, Vote, line_of
from helpers.command_line import run
from helpers.small_datasets import scored
from helpers.vote_data import colours

NAN = float("nan")
VOTE = Vote("v", "2026-01-01T00:00:00+00:00", "anna", "p", ("g00000/0", "g00000/1"), ("base", "tuned"), "left")


def log(folder: Path, *entries: Vote | Undo) -> Path:
    """Append entries to the votes of a dataset, each vote with an id of its own."""
    path = folder / "votes.jsonl"
    start = path.read_text().count("\n") if path.is_file() else 0
    with path.open("a") as stream:
        for n, entry in enumerate(entries):
            stream.write(line_of(replace(entry, id=f"v{start + n}")))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three groups of three; anna votes on two, ben on one of them, against her."""
    return log(
        colours(tmp_path / "data", 3, 3),
        VOTE,
        replace(VOTE, images=("g00000/2", "g00000/1"), answer="right"),
        replace(
            VOTE, images=("g00001/2", "g00001/0", "g00001/1"), models=("m",) * 3, answer="ranking", ranking=(1, 2, 2)
        ),
        replace(VOTE, rater="ben", answer="right"),
        replace(VOTE, images=("g00002/0", "g00002/1"), answer="skip"),
        replace(VOTE, images=("g00009/0", "g00009/1")),  # not there
        replace(VOTE, images=("g00000/0", "g00001/1")),  # not of one group
    )


def values(folder: Path, source: str) -> list[float]:
    return list(PreferenceDataset(folder).score_array(source))


def test_the_sources(data: Path) -> None:
    dataset = PreferenceDataset(data)
    assert dataset.raters() == ["anna", "ben"]
    np.testing.assert_array_equal(values(data, "anna"), [1, 0.5, 0, 0.25, 0.25, 1, NAN, NAN, NAN])
    np.testing.assert_array_equal(values(data, "ben"), [0, 1, NAN, *[NAN] * 6])
    np.testing.assert_array_equal(values(data, "human"), [0.5, 2 / 3, 0, 0.25, 0.25, 1, NAN, NAN, NAN])
    assert dataset.scores("anna")["g00001", 2] == 1
    assert summarise_dataset(dataset)["votes"] == "anna: 5, ben: 1"
    with pytest.raises(DiffalignError, match="scored by: anna, ben"):
        values(data, "cleo")


def test_rank_and_train_read_them(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rank", data) == 0  # human is the default where there are votes
    dataset = PreferenceDataset(data)
    assert dataset.column("preference") == [[0.5, pytest.approx(2 / 3), 0], [0.25, 0.25, 1], []]
    assert dataset.column("dropped") == [None, None, "fewer than two images left"]
    assert run("rank", data, "sources=[ben]") == 0
    assert PreferenceDataset(data).column("members") == [[0, 1], [], []]
    [first] = labels(PreferenceDataset(data), [0], "scores.ben")
    assert list(first) == [0, 1]
    assert "ranked 3 groups by ben" in capsys.readouterr().out


def test_new_votes_make_another_ranking(data: Path) -> None:
    assert run("rank", data, "sources=[anna]") == 0
    before = PreferenceDataset(data).column("preference")
    log(data, replace(VOTE, rater="ben"))  # nothing to do with anna
    done = (data / "ranking.json").read_bytes()
    assert run("rank", data, "sources=[anna]") == 0 and (data / "ranking.json").read_bytes() == done
    log(data, Undo("", VOTE.time, "anna", "v2"))
    assert run("rank", data, "sources=[anna]") == 0
    assert before[1] == [0, 0, 1] and PreferenceDataset(data).column("preference")[1] == []


def test_a_rater_votes_beside_rewards(tmp_path: Path) -> None:
    folder = scored(tmp_path / "data", {"late": [[0.0, 1.0]], "early": [[1.0, 0.0]]}).folder
    log(folder, replace(VOTE, images=("g0/0", "g0/1")))
    assert run("rank", folder, "sources=[late,early,anna]") == 0
    assert PreferenceDataset(folder).column("preference") == [pytest.approx([2 / 3, 1 / 3])]


def test_imported_preferences_stay_under_the_votes(tmp_path: Path) -> None:
    folder = scored(tmp_path / "data", {"late": [[0.0, 1.0], [0.0, 1.0]]}).folder
    table = pq.read_table(folder / "groups.parquet")
    given = table.set_column(table.column_names.index("human"), "human", [[[0.0, 1.0], [0.0, 1.0]]])
    pq.write_table(given, folder / "groups.parquet")
    log(folder, replace(VOTE, images=("g0/0", "g0/1")))
    assert values(folder, "human") == [1, 0, 0, 1]  # the vote in place of the first group's
    assert run("rank", folder) == 0
    assert PreferenceDataset(folder).column("preference") == [[1, 0], [0, 1]]
    log(folder, Undo("", VOTE.time, "anna", "v0"))
    assert values(folder, "human") == [0, 1, 0, 1]


def test_a_torn_last_line_does_not_stop_a_ranking(data: Path) -> None:
    with (data / "votes.jsonl").open("a") as stream:
        stream.write('{"id": "to')
    assert run("rank", data) == 0
