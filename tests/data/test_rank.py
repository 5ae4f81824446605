"""Preferences from stored scores: Syn-Pic's votes, choices, filters, splits, and what a dataset holds."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.cli import app
from diffalign.data.choose_members import Limit, choose_members, near_duplicates, split_of
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.dataset_export import export
from diffalign.data.dataset_summary import pair_agreement
from diffalign.data.hashes import difference_hash
from diffalign.data.labels import labels
from diffalign.data.rank import Rules, generator_warning, rank
from diffalign.data.writer import write_groups
from diffalign.errors import DiffalignError
from diffalign.rewards.aggregate import vote_shares
from helpers.small_datasets import picture, scored

# rankdpo.md, vector B: five rewards (rows) on four images.
SYNPIC = {
    "hpsv21": [0.281, 0.263, 0.274, 0.290],
    "mps": [11.2, 10.1, 10.1, 12.4],
    "pickscore": [21.9, 21.4, 22.0, 22.6],
    "vqascore": [0.81, 0.88, 0.74, 0.69],
    "imagereward": [0.35, -0.10, 0.62, 1.05],
}
PHI = [8 / 15, 3 / 15, 6 / 15, 12 / 15]


def test_syn_pic_votes(tmp_path: Path) -> None:
    dataset = scored(tmp_path, {name: [values] for name, values in SYNPIC.items()})
    rank(dataset, list(SYNPIC))
    assert PreferenceDataset(tmp_path).group(0)["preference"] == pytest.approx(PHI)
    assert sum(PHI) == pytest.approx(1.9333333333)


def test_any_increasing_transform_leaves_the_votes() -> None:
    rng = np.random.default_rng(0)
    transforms = [np.exp, lambda x: x**3, lambda x: 5 * x - 2, np.arctan, lambda x: np.sign(x) * np.abs(x) ** 0.2]
    for _ in range(20):
        scores = np.round(rng.normal(size=(5, 4)), 1)  # rounded, so that ties occur
        moved = np.stack([transforms[i](row) for i, row in zip(rng.permutation(5), scores, strict=True)])
        assert np.array_equal(vote_shares(scores), vote_shares(moved))


def test_weighted_votes() -> None:
    scores = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    assert vote_shares(scores, np.array([1.0, 1.0])) == pytest.approx(vote_shares(scores))
    assert vote_shares(scores, np.array([3.0, 1.0])) == pytest.approx([0.25, 0.5, 0.75])
    assert vote_shares(np.array([[np.nan, 1.0, 2.0], [1.0, 0.0, 2.0]]), np.array([3.0, 1.0])) == pytest.approx(
        [0.5, 0.0, 1.0]
    )


def test_the_mean_of_z_scores(tmp_path: Path) -> None:
    a, b = [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], [[9.0, 0.0, 0.0], [0.0, 1.0, 2.0]]
    dataset = scored(tmp_path, {"a": a, "b": b})
    rank(dataset, ["a", "b"], rules=Rules(aggregate="mean", weights={"b": 3.0}))
    z = [np.array(x) for x in (a, b)]
    mean = sum(w * (x - x.mean()) / x.std() for w, x in zip((1, 3), z, strict=True)) / 4
    for g in range(2):
        assert np.array_equal(np.argsort(PreferenceDataset(tmp_path).group(g)["preference"]), np.argsort(mean[g]))


def test_near_ties_are_dropped_and_come_back(tmp_path: Path) -> None:
    dataset = scored(tmp_path, {"a": [[1, 2], [1, 1], [2, 1]], "b": [[1, 2], [2, 1], [1, 2]]})
    report = rank(dataset, ["a", "b"], rules=Rules(min_gap=0.6))
    assert report["dropped"] == {"near tie": 2}
    ranked = PreferenceDataset(tmp_path)
    assert ranked.column("dropped") == [None, "near tie", "near tie"] and ranked.split("train") == [0]
    assert ranked.facts("train")["groups"] == 1 and ranked.facts()["dropped_by_ranking"] == 2
    assert rank(ranked, ["a"])["dropped"] == {}
    assert len(PreferenceDataset(tmp_path).split("train")) == 3


D3S = np.array([1.9, 0.7, 0.3, 0.1, -0.2, -0.4, -0.6, -1.8])


@pytest.mark.parametrize(("k", "variance"), [(2, 3.4225), (3, 2.375556), (4, 1.9225), (6, 1.324722), (8, 1.0)])
def test_the_k_that_differ_most(k: int, variance: float) -> None:
    """gdro.md V13, and brute force."""
    chosen = choose_members(D3S, "variance", k, np.random.default_rng(0))
    assert len(chosen) == k and np.var(D3S[chosen]) == pytest.approx(variance, abs=2e-6)
    best = max(np.var(D3S[list(c)]) for c in itertools.combinations(range(8), k))
    assert np.var(D3S[chosen]) == pytest.approx(best)
    if k == 4:
        assert D3S[chosen].tolist() == [1.9, 0.7, -0.6, -1.8]


def test_other_choices() -> None:
    values = np.array([0.5, np.nan, 0.9, 0.1, 0.7])
    assert choose_members(values, "extremes", 3, np.random.default_rng(0)).tolist() == [2, 3, 4]
    assert choose_members(values, "variance", 2, np.random.default_rng(0)).tolist() == [2, 3]
    assert choose_members(values, "all", None, np.random.default_rng(0)).tolist() == [0, 2, 3, 4]  # absent is not last
    drawn = {tuple(choose_members(values, "random", 2, np.random.default_rng(s))) for s in range(60)}
    assert len(drawn) == 6 and all(len(d) == 2 and 1 not in d for d in drawn)
    tied = {tuple(choose_members(np.zeros(4), "extremes", 2, np.random.default_rng(s))) for s in range(60)}
    assert len(tied) == 6  # between equals, the position of an image decides nothing


def test_chosen_images_are_those_that_training_sees(tmp_path: Path) -> None:
    dataset = scored(tmp_path, {"a": [[4, 1, 3, 2], [1, 2, 3, 4]]})
    rank(dataset, ["a"], rules=Rules(choose="extremes", k=2))
    ranked = PreferenceDataset(tmp_path)
    assert (
        ranked.members("g0") == [0, 1] and ranked.members("g1") == [0, 3] and ranked.all_members("g1") == [0, 1, 2, 3]
    )
    assert [list(x) for x in labels(ranked, [0, 1])] == [[1, 0], [0, 1]]
    assert [list(x) for x in labels(ranked, [0, 1], "scores.a")] == [[4, 1], [1, 4]]
    assert [i.index for i in ranked.images("g1")] == [0, 3]


NAN = math.nan


@pytest.mark.parametrize("aggregate", ["votes", "mean"])
@pytest.mark.parametrize("place", range(4))
def test_an_image_without_a_score_is_not_the_worst(place: int, aggregate: str, tmp_path: Path) -> None:
    """It is no member of the ranking and of no pair, and the others rank as if it were not there."""
    values = [4.5, 2.0, 3.0, 2.5]
    values[place] = NAN
    others = [k for k in range(4) if k != place]
    report = rank(scored(tmp_path / "own", {"a": [values]}), ["a"], rules=Rules(aggregate=aggregate))
    ranked = PreferenceDataset(tmp_path / "own")
    assert report["without_score"] == 1 and report["images"] == 3 and not report["dropped"]
    assert ranked.members("g0") == others
    best, worst = max(others, key=lambda k: values[k]), min(others, key=lambda k: values[k])
    assert dict(zip(others, ranked.group(0)["preference"], strict=True))[best] == 1.0
    export(ranked, tmp_path / "pap", "pickapic")
    (row,) = pq.read_table(next((tmp_path / "pap" / "data").glob("*.parquet"))).to_pylist()
    assert {row["image_0_uid"], row["image_1_uid"]} == {f"g0-{best}", f"g0-{worst}"}
    assert row["best_image_uid"] == f"g0-{best}"


@pytest.mark.parametrize(
    ("scores", "weights", "members", "preference"),
    [
        # One voter could not score an image: it is ranked by the other.
        ({"a": [NAN, 0.2, 0.1], "b": [0.9, 0.5, 0.1]}, {}, None, [1.0, 2 / 3, 0.0]),
        # The voter that could not has weight 0 and no say, whatever it says.
        ({"a": [NAN, 0.1, 0.2], "b": [0.9, 0.5, 0.1]}, {"a": 0}, None, [1.0, 0.5, 0.0]),
        ({"a": [0.1, 0.5, 0.9], "b": [0.9, NAN, 0.1]}, {"a": 0}, [0, 2], [1.0, 0.0]),
        # No voter has scored it, or it says infinity.
        ({"a": [0.5, NAN, 0.2], "b": [0.5, NAN, 0.2]}, {}, [0, 2], [1.0, 0.0]),
        ({"a": [0.5, math.inf, 0.2], "b": [0.5, NAN, 0.2]}, {}, [0, 2], [1.0, 0.0]),
        # Its only voter has scored nobody else: it can be compared with none.
        ({"a": [0.5, NAN, 0.2], "b": [NAN, 0.7, NAN]}, {}, [0, 2], [1.0, 0.0]),
    ],
)
def test_who_has_a_say(
    scores: dict[str, list[float]],
    weights: dict[str, float],
    members: list[int] | None,
    preference: list[float],
    tmp_path: Path,
) -> None:
    dataset = scored(tmp_path, {name: [values] for name, values in scores.items()})
    rank(dataset, list(scores), rules=Rules(weights=weights))
    group = PreferenceDataset(tmp_path).group(0)
    assert group["members"] == members and group["preference"] == pytest.approx(preference)


def test_the_mean_leaves_a_voter_of_weight_0_out(tmp_path: Path) -> None:
    dataset = scored(tmp_path, {"a": [[NAN, 1, 2]], "b": [[3, 2, 1]]})
    assert rank(dataset, ["a", "b"], rules=Rules(aggregate="mean", weights={"a": 0}))["without_score"] == 0
    assert PreferenceDataset(tmp_path).group(0)["preference"] == [1.0, 0.5, 0.0]
    with pytest.raises(DiffalignError, match="no voter has a weight above 0"):
        rank(dataset, ["a", "b"], rules=Rules(weights={"a": 0, "b": 0}))


@pytest.mark.parametrize(
    ("how", "k", "members"), [("extremes", 2, [0, 3]), ("variance", 2, [0, 3]), ("random", 3, [0, 2, 3])]
)
def test_no_choice_takes_an_image_without_a_score(how: str, k: int, members: list[int], tmp_path: Path) -> None:
    rank(scored(tmp_path, {"a": [[4.5, NAN, 3.0, 2.0]]}), ["a"], rules=Rules(choose=how, k=k))  # type: ignore[arg-type]
    ranked = PreferenceDataset(tmp_path).group(0)
    assert ranked["members"] == members and max(ranked["preference"] or []) == 1.0


def test_groups_without_two_scores_are_dropped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored(tmp_path, {"a": [[1, NAN, 2], [NAN, 2, NAN], [NAN, NAN, NAN], [1, 2, 3]]})
    (tmp_path / "sampling.json").write_text("{}")  # so that the card is written
    with pytest.raises(SystemExit):
        app(["rank", str(tmp_path)], prog_name="diffalign")
    told = capsys.readouterr().out
    assert "2 dropped (fewer than two images left)" in told and "6 images without a score are left out" in told
    assert "6 images without a score are left out" in (tmp_path / "README.md").read_text()
    assert PreferenceDataset(tmp_path).split("train") == [0, 3]


def test_a_ranking_of_older_rules_is_made_again(tmp_path: Path) -> None:
    import json

    scored(tmp_path, {"a": [[1, NAN, 2]]})
    for _ in range(2):
        with pytest.raises(SystemExit):
            app(["rank", str(tmp_path)], prog_name="diffalign")
        assert PreferenceDataset(tmp_path).group(0)["members"] == [0, 2]
        ranking = json.loads((tmp_path / "ranking.json").read_text())
        del ranking["settings"]["rules"]
        (tmp_path / "ranking.json").write_text(json.dumps(ranking))
        row = PreferenceDataset(tmp_path).group(0)
        write_groups(tmp_path, [{**row, "members": None, "preference": [0.5, 0.0, 1.0]}])


def test_limits_and_duplicates(tmp_path: Path) -> None:
    dataset = scored(tmp_path / "a", {"a": [[4, 1, 3], [1, 2, 3]], "safe": [[0.9, 0.1, math.nan], [0.2, 0.8, 0.9]]})
    report = rank(dataset, ["a"], rules=Rules(limits=(Limit("safe", low=0.5),)))
    ranked = PreferenceDataset(tmp_path / "a")
    assert report["dropped"] == {"fewer than two images left": 1} and ranked.group(1)["members"] == [1, 2]
    assert ranked.group(1)["preference"] == [0, 1]
    same = scored(tmp_path / "b", {"a": [[2, 3, 1]]}, same=True)
    rank(same, ["a"], rules=Rules(duplicates=2))
    assert PreferenceDataset(tmp_path / "b").group(0)["members"] == [1]  # the best of three equal pictures stays


def test_the_hash_survives_what_it_must() -> None:
    smooth = Image.fromarray((np.add.outer(np.arange(64), 2 * np.sin(np.arange(64) / 5) * 30) % 256).astype(np.uint8))
    base = difference_hash(smooth)
    assert (base ^ difference_hash(smooth.resize((200, 200)))).bit_count() <= 4
    assert (base ^ difference_hash(smooth.transpose(Image.Transpose.FLIP_LEFT_RIGHT))).bit_count() > 16
    hashes = np.array([base, base ^ 3, difference_hash(picture(1))], dtype=np.uint64)
    assert near_duplicates(hashes, np.array([0.1, 0.9, 0.5]), 2).tolist() == [True, False, False]


def test_no_prompt_is_in_two_splits(tmp_path: Path) -> None:
    shares = {"validation": 0.2, "test": 0.1}
    prompts = [f"prompt {i}" for i in range(2000)]
    split = [split_of(p, shares, 0) for p in prompts]
    assert abs(split.count("validation") / 2000 - 0.2) < 0.03 and abs(split.count("test") / 2000 - 0.1) < 0.03
    assert [split_of(f"  {p.upper()} ", shares, 0) for p in prompts] == split
    assert [split_of(p, shares, 1) for p in prompts] != split
    with pytest.raises(SystemExit) as left:
        app(["rank", str(scored(tmp_path, {"a": [[1, 2]] * 60}).folder), "splits={test: 0.3}"], prog_name="diffalign")
    assert left.value.code == 0
    assert {"test", "train"} == set(PreferenceDataset(tmp_path).column("split"))


def test_a_generator_that_explains_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    fair = rng.normal(size=(200, 4)).tolist()
    assert rank(scored(tmp_path / "fair", {"a": fair}, ["x", "y"] * 2), ["a"])["generator_explains"] < 0.05
    assert rank(scored(tmp_path / "one", {"a": fair[:5]}), ["a"])["generator_explains"] is None
    biased = [[0, 1, 2, 3]] * 20
    scored(tmp_path / "biased", {"a": biased}, ["w", "x", "y", "z"])
    with pytest.raises(SystemExit):
        app(["rank", str(tmp_path / "biased")], prog_name="diffalign")
    assert "which generator drew an image explains 100% of the preferences" in capsys.readouterr().out
    assert generator_warning(0.2) is None


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("sources=[b]", "no scores of 'b'; scored by: a"),
        ("min_gap=-1", "min_gap should be greater than or equal to 0"),
        ("choose=extremes", "choose and k go together"),
        ("splits={train: 0.5}", "train gets what the other splits leave"),
        ("weights={b: 2.0}", "b does not vote; the voters are a"),
        ("limits=[{source: a, low: 3}]", "unknown key limits.0.low; keys here: source, min, max"),
    ],
)
def test_mistakes(tmp_path: Path, override: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    scored(tmp_path, {"a": [[1, 2]]})
    with pytest.raises(SystemExit) as left:
        app(["rank", str(tmp_path), override], prog_name="diffalign")
    assert left.value.code == 2 and complaint in capsys.readouterr().err


def test_agreement_against_counting_by_hand(tmp_path: Path) -> None:
    from scipy.stats import kendalltau

    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 4, (1, 30)).astype(float).tolist() for _ in range(2))
    dataset = scored(tmp_path, {"a": a, "b": b})
    found = pair_agreement(dataset, dataset.score_array("a"), dataset.score_array("b"))
    pairs = list(itertools.combinations(range(30), 2))
    signs = [(np.sign(a[0][i] - a[0][j]), np.sign(b[0][i] - b[0][j])) for i, j in pairs]
    strict = [x * y for x, y in signs if x * y]
    assert found["agree"] == pytest.approx(sum(s > 0 for s in strict) / len(strict))
    assert found["tau"] == pytest.approx(kendalltau(a[0], b[0]).statistic)
    assert found["tied"] == pytest.approx(1 - len(strict) / len(pairs))


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ranked(tmp_path: Path) -> PreferenceDataset:
    dataset = scored(tmp_path / "own", {"a": [[4, 1, 3], [1, 2, 2], [1, 1, 1]], "b": [[4, 1, 3], [2, 1, 3], [1, 1, 1]]})
    rank(dataset, ["a", "b"])
    return PreferenceDataset(tmp_path / "own")


def test_one_row_a_prompt_opens_in_datasets(ranked: PreferenceDataset, tmp_path: Path) -> None:
    assert export(ranked, tmp_path / "rows", "rows") == {"train": 3}
    files = str(tmp_path / "rows" / "data" / "*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "hf"))
    row = loaded[0]
    assert row["prompt"] == "p0"
    assert all(isinstance(i, Image.Image) for i in row["images"])
    assert np.array_equal(np.asarray(row["images"][2]), np.asarray(picture(2)))
    assert row["preference"] == [1.0, 0.0, 0.5]
    assert row["scores"]["b.score"] == [4, 1, 3]
    assert row["seeds"] == [0, 1, 2]
    whole = datasets.load_dataset(str(tmp_path / "rows"), cache_dir=str(tmp_path / "hf2"))  # by its card
    assert whole["train"].num_rows == 3
    card = (tmp_path / "rows" / "README.md").read_text()
    assert "license: other" in card
    assert "| a | 1 | none | MIT |" in card


def test_pickapic_columns_are_read_back_by_others(ranked: PreferenceDataset, tmp_path: Path) -> None:
    """A reader that knows Pick-a-Pic and nothing of this package."""
    import io

    assert export(ranked, tmp_path / "pap", "pickapic", "all") == {"train": 5}
    read = []
    for row in pq.read_table(next((tmp_path / "pap" / "data").glob("*.parquet"))).to_pylist():
        better, worse = ("jpg_0", "jpg_1") if row["label_0"] == 1 else ("jpg_1", "jpg_0")
        assert row["label_0"] + row["label_1"] == 1 and row["has_label"] and row["are_different"]
        assert row["best_image_uid"] == row["image_0_uid" if row["label_0"] == 1 else "image_1_uid"]
        sides = [np.asarray(Image.open(io.BytesIO(row[side]))) for side in (better, worse)]
        read.append((row["caption"], [next(k for k in range(3) for g in (int(row["caption"][1]),)
                     if np.array_equal(side, np.asarray(picture(10 * g + k)))) for side in sides]))  # fmt: skip
    # p1: shares 1/4, 1/4, 3/4; p2 has no preference
    assert sorted(read) == [("p0", [0, 1]), ("p0", [0, 2]), ("p0", [2, 1]), ("p1", [2, 0]), ("p1", [2, 1])]
    assert export(ranked, tmp_path / "best", "pickapic") == {"train": 2}


def test_webdataset(ranked: PreferenceDataset, tmp_path: Path) -> None:
    import json
    import tarfile

    for name in ("one", "two"):
        export(ranked, tmp_path / name, "webdataset")
    one, two = (next((tmp_path / n / "data").glob("*.tar")) for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    with tarfile.open(one) as tar:
        assert tar.getnames()[:4] == ["g0.json", "g0.0.png", "g0.1.png", "g0.2.png"]
        member = tar.extractfile("g1.json")
        assert member is not None
        told = json.load(member)
    assert told["prompt"] == "p1" and told["scores"]["a.score"] == [1, 2, 2]


def test_the_round_trip_through_pickapic(ranked: PreferenceDataset, tmp_path: Path) -> None:
    from diffalign.data.convert import open_rows
    from diffalign.data.imported import write_imported

    export(ranked, tmp_path / "pap", "pickapic", "all")
    report = write_imported(open_rows([tmp_path / "pap" / "data"], None)[1], tmp_path / "back")
    assert report.groups == 5 and not report.faults
    with pytest.raises(DiffalignError, match="holds data already"):
        export(ranked, tmp_path / "pap", "rows")
