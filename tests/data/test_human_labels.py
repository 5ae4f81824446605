"""Preferences that people gave are never lost: ranking keeps them, takes them by default, and can bring them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.dataset_export import export
from diffalign.data.imported import ImportedGroup, vote_shares_of_ranks, write_imported
from diffalign.data.labels import labels, shuffled_labels
from diffalign.data.rank import rank as rank_groups
from diffalign.data.real_against_generated import write_real_against_generated
from diffalign.data.writer import png_bytes, write_groups
from diffalign.health import describe
from helpers.command_line import run
from helpers.small_datasets import picture, scored

NAN = float("nan")
PAIRS = [(1.0, 0.0)] * 6
FORMS = {
    "pairs": PAIRS,
    "ranked groups": [(1.0, 0.5, 0.0), (0.0, 0.5, 1.0)],
    "strengths": [(0.7, 0.3), (0.1, 0.9)],
    "ties": [(0.5, 0.5), (1.0, 0.0)],
    "an image not judged": [(1.0, NAN, 0.0), (0.0, 1.0)],
}


def people(out: Path, preferences: list[tuple[float, ...]]) -> PreferenceDataset:
    """A dataset as `data convert` writes it, scored by a reward that prefers the later images."""
    groups = [
        ImportedGroup(
            f"prompt {g}", tuple(png_bytes(picture(10 * g + k)) for k in range(len(values))), values, f"row {g}"
        )
        for g, values in enumerate(preferences)
    ]
    write_imported(groups, out)
    dataset = PreferenceDataset(out)
    lists = [[float(k) for k in range(len(values))] for values in preferences]
    copied = scored(out.parent / "scores-of" / out.name, {"late": lists})
    names = dict(zip(copied.column("group_id"), dataset.column("group_id"), strict=True))
    table = pq.read_table(copied.folder / "scores" / "late.parquet")
    ids = pa.array([names[name] for name in table["group_id"].to_pylist()])
    (out / "scores").mkdir()
    pq.write_table(table.set_column(0, "group_id", ids), out / "scores" / "late.parquet")
    return dataset


def state(folder: Path) -> list[Any]:
    """What a ranking may change, of every group."""
    dataset = PreferenceDataset(folder)
    return [dataset.column(name) for name in ("preference", "members", "dropped", "split")]


@pytest.mark.parametrize("form", FORMS)
def test_ranking_by_a_reward_keeps_them_and_can_go_back(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "mine"
    people(data, FORMS[form])
    before = state(data)
    assert run("rank", data, "sources=[late]") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert state(data) != before
    assert f"the preferences that people gave for {len(FORMS[form])} groups are kept as the source human" in told
    assert "sources=[human]` brings them back" in told
    assert run("rank", data, "sources=[human]") == 0
    assert "this replaces the ranking by late" in capsys.readouterr().out
    assert state(data) == before
    for sources in ("[late, human]", "[late]", "null"):  # null: the default is people
        assert run("rank", data, f"sources={sources}") == 0
    assert state(data) == before
    assert "ranked" in (told := capsys.readouterr().out) and "by human" in told


@pytest.mark.parametrize("scored_too", [True, False])
@pytest.mark.parametrize("how", ["as imported", "ranked by a reward", "an older file"])
def test_splits_alone_touch_no_label(how: str, scored_too: bool, tmp_path: Path) -> None:
    data = tmp_path / "mine"
    people(data, PAIRS * 5)
    if how == "ranked by a reward":
        run("rank", data, "sources=[late]", "min_gap=0.5")
    if how == "an older file":
        table = pq.read_table(data / "groups.parquet").drop_columns(["human"])
        pq.write_table(table, data / "groups.parquet")
    if not scored_too:
        (data / "scores" / "late.parquet").unlink()
    before = state(data)
    assert run("rank", data, "splits={validation: 0.3}") == 0
    *after, splits = state(data)
    assert after == before[:3] and 0 < splits.count("validation") < 30
    assert run("rank", data, "splits={validation: 0.3}", "seed=1") == 0  # another seed, other prompts, the same labels
    assert state(data)[:3] == before[:3] and state(data)[3] != splits
    assert PreferenceDataset(data).human == [[1.0, 0.0]] * 30


def test_a_ranking_after_new_splits_is_made(tmp_path: Path) -> None:
    """The same command as before the splits changed must not find that it was done already."""
    data = tmp_path / "mine"
    people(data, PAIRS * 5)
    both = ("rank", data, "sources=[late]", "splits={test: 0.5}")
    run(*both)
    before = state(data)
    run("rank", data, "splits={test: 0.1}")
    assert state(data)[:3] == before[:3] and state(data)[3] != before[3]
    run(*both)
    assert state(data) == before


def test_an_older_dataset_has_its_labels_kept_too(tmp_path: Path) -> None:
    people(tmp_path / "mine", FORMS["ranked groups"])
    path = tmp_path / "mine" / "groups.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["human"]), path)
    before = state(tmp_path / "mine")
    run("rank", tmp_path / "mine", "sources=[late]")
    assert state(tmp_path / "mine") != before
    run("rank", tmp_path / "mine")
    assert state(tmp_path / "mine") == before


def test_a_drawn_dataset_has_no_labels_of_people(tmp_path: Path) -> None:
    """Also not after ranking, where an older file does not say whose preferences it holds."""
    dataset = scored(tmp_path, {"a": [[1, 2], [2, 1]]})
    assert run("rank", tmp_path) == 0
    assert PreferenceDataset(tmp_path).human == [None, None] and dataset.human == [None, None]
    pq.write_table(pq.read_table(tmp_path / "groups.parquet").drop_columns(["human"]), tmp_path / "groups.parquet")
    assert PreferenceDataset(tmp_path).human == [None, None]
    (tmp_path / "ranking.json").rename(tmp_path / "sampling.json")
    assert PreferenceDataset(tmp_path).human == [None, None]


def test_people_vote_limit_and_are_labels_like_a_reward(tmp_path: Path) -> None:
    data = tmp_path / "mine"
    dataset = people(data, [(1.0, 0.5, 0.0), (0.0, 1.0)])
    assert [list(x) for x in labels(dataset, [0, 1], "scores.human")] == [[1, 0.5, 0], [0, 1]]
    assert dataset.score_array("human").tolist() == [1, 0.5, 0, 0, 1]
    rank_groups(dataset, ["late", "human"])
    assert PreferenceDataset(data).column("preference") == [[0.5, 0.5, 0.5], [0.0, 1.0]]
    run("rank", data, "sources=[late]", "limits=[{source: human, max: 0.9}]")
    assert PreferenceDataset(data).members(dataset.group(0)["group_id"]) == [1, 2]


def test_real_images_against_generated_ones_are_kept(tmp_path: Path) -> None:
    from diffalign.data.prompts import PromptRow

    drawn = scored(tmp_path / "drawn", {"a": [[1, 2], [2, 1]]})
    rank_groups(drawn, ["a"])
    real = [(PromptRow(f"p{g}"), lambda: png_bytes(picture(99))) for g in range(2)]
    write_real_against_generated(real, PreferenceDataset(drawn.folder), tmp_path / "roles")
    assert PreferenceDataset(tmp_path / "roles").human == [[1.0, 0.0, 0.0]] * 2


def test_a_row_that_says_whose_preference_it_is_is_believed(tmp_path: Path) -> None:
    dataset = people(tmp_path / "mine", PAIRS[:1])
    row = dataset.group(0)
    write_groups(tmp_path / "mine", [{**row, "preference": [0.0, 1.0]}])
    assert PreferenceDataset(tmp_path / "mine").human == [[1.0, 0.0]]
    del row["human"]
    write_groups(tmp_path / "mine", [{**row, "preference": [0.0, 1.0]}])
    assert PreferenceDataset(tmp_path / "mine").human == [[0.0, 1.0]]


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_an_imported_image_without_a_label_is_no_member(absent: int, tmp_path: Path) -> None:
    values = [0.9, 0.1, 0.4]
    values[absent] = NAN
    images = tuple(png_bytes(picture(k)) for k in range(3))
    alone = ImportedGroup("b", images[:2], (1.0, NAN), "row 1")
    report = write_imported([ImportedGroup("a", images, tuple(values), "row 0"), alone], tmp_path)
    assert report.groups == 1 and report.counted == {"fewer than two images have a label": 1}
    dataset = PreferenceDataset(tmp_path)
    others = [k for k in range(3) if k != absent]
    assert dataset.members(dataset.group(0)["group_id"]) == others
    assert dataset.group(0)["preference"] == pytest.approx([values[k] for k in others])
    ranks: list[float] = [1.0, 2.0, 3.0]
    ranks[absent] = NAN
    shares = vote_shares_of_ranks(ranks)
    assert np.isnan(shares[absent]) and [shares[k] for k in others] == [1.0, 0.0]


# --- shuffled labels are named wherever they go -----------------------------------------------------------------------


def test_shuffling_is_named_in_the_message_the_card_and_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "Preferences were shuffled within each group (seed 3), as a control"
    data = tmp_path / "mine"
    people(data, PAIRS)
    assert run("rank", data, "shuffle=true", "seed=3") == 0
    assert words in " ".join(capsys.readouterr().out.split())
    export(PreferenceDataset(data), tmp_path / "export", "rows")
    assert words in (tmp_path / "export" / "README.md").read_text()
    (finding,) = shuffled_labels(PreferenceDataset(data))
    assert words in describe(finding)
    run("data", "inspect", data)
    assert words in " ".join(capsys.readouterr().out.split())
    assert run("rank", data, "seed=3") == 0
    assert words not in capsys.readouterr().out and not shuffled_labels(PreferenceDataset(data))
    assert PreferenceDataset(data).column("preference") == [[1.0, 0.0]] * 6
    export(PreferenceDataset(data), tmp_path / "again", "rows")
    assert "Preferences are those that people gave." in (tmp_path / "again" / "README.md").read_text()


# --- splits while importing -------------------------------------------------------------------------------------------


def folders(tmp_path: Path, count: int = 40) -> list[Path]:
    sides = [tmp_path / "win", tmp_path / "lose"]
    for n, side in enumerate(sides):
        side.mkdir()
        for k in range(count):
            picture(2 * k + n).save(side / f"{k:02d}.png")
            (side / f"{k:02d}.txt").write_text(f"prompt {k // 2}")  # two pairs of each prompt
    return sides


@pytest.mark.parametrize("verb", [["pairs"], ["data", "convert"]])
def test_importing_can_split(verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = folders(tmp_path)
    out = tmp_path / "out"
    assert run(*verb, *sides, "--out", out, "--split", "validation=0.2", "--split", "test=0.2") == 0
    dataset = PreferenceDataset(out)
    splits = dict.fromkeys(["train", "validation", "test"], 0)
    where: dict[str, set[str]] = {}
    for prompt, split in zip(dataset.column("prompt"), dataset.column("split"), strict=True):
        splits[split] += 1
        where.setdefault(prompt, set()).add(split)
    assert all(splits.values()) and all(len(found) == 1 for found in where.values())
    told = " ".join(capsys.readouterr().out.split())
    assert f"(test {splits['test']}, train {splits['train']}, validation {splits['validation']})" in told
    # `rank` with the same shares agrees.
    before = dataset.column("split")
    run("rank", out, "splits={validation: 0.2, test: 0.2}")
    assert PreferenceDataset(out).column("split") == before


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["validation"], "--split validation: should be a name and a share, such as validation=0.1"),
        (["validation=ten"], "should be a name and a share"),
        (["train=0.5"], "train gets what the other splits leave"),
        (["a=0.6", "b=0.4"], "shares must be positive and leave some prompts to train"),
        (["a=-0.1"], "shares must be positive"),
        (["a=nan"], "shares must be positive"),
    ],
)
@pytest.mark.parametrize("verb", [["pairs"], ["data", "convert"]])
def test_bad_splits(
    verb: list[str], given: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = folders(tmp_path, 2)
    words = [word for split in given for word in ("--split", split)]
    assert run(*verb, *sides, "--out", tmp_path / "out", *words) == 2
    assert complaint in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "out").exists()


def test_a_split_of_the_files_stays(tmp_path: Path) -> None:
    images = tuple(png_bytes(picture(k)) for k in range(2))
    groups = [
        ImportedGroup(f"p{n}", images, (1.0, 0.0), f"row {n}", split="test" if n % 2 else "train") for n in range(60)
    ]
    report = write_imported(groups, tmp_path, splits={"validation": 0.5})
    assert report.splits["test"] == 30 and report.splits["validation"] + report.splits["train"] == 30
    splits = PreferenceDataset(tmp_path).column("split")
    assert splits[1::2] == ["test"] * 30 and "validation" in splits


def test_ranking_by_people_where_nobody_judged_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored(tmp_path, {"a": [[1, 2]]})
    assert run("rank", tmp_path, "sources=[human]") == 2
    assert "has no scores of 'human'" in capsys.readouterr().err
    assert not (tmp_path / "ranking.json").exists()
