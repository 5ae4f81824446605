"""Where pictures and prompts come from, and what is made of the scores: win rates, agreement, tables, the dataset."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.imported import ImportedGroup, write_imported
from diffalign.errors import DiffalignError
from diffalign.evaluation.compare import compare
from diffalign.files.images import Unreadable, decode
from diffalign.rewards import load_reward
from diffalign.scoring.captions import PromptTable, from_name
from diffalign.scoring.compare_folders import compare_scores
from diffalign.scoring.gallery import choose
from diffalign.scoring.human_agreement import agree, read_choices
from diffalign.scoring.pairing import heading, pair_up
from diffalign.scoring.run import Scores
from diffalign.scoring.score_summary import faults, summarise
from diffalign.scoring.sources import Prompting, collect
from diffalign.scoring.spec import parse, parse_all
from diffalign.stages.score import ScoreRequest, score
from helpers import pictures
from helpers.command_line import run
from helpers.scored_items import made, prompts_of


def test_prompt_sources(tmp_path: Path) -> None:
    folder = pictures.folder(tmp_path / "in", 3, ["from metadata"])
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "000.png", "text": "from metadata"}) + "\n")
    (folder / "001.txt").write_text(" from the text \n")
    (folder / "sub").mkdir()
    pictures.smooth(1).save(folder / "sub" / "a_red-cat_000012.png")
    key = "sub/a_red-cat_000012.png"
    auto = prompts_of([str(folder)])
    assert auto == {"000.png": "from metadata", "001.png": "from the text", "002.png": None, key: None}
    assert prompts_of([str(folder)], source="name")[key] == "a red-cat"
    assert prompts_of([str(folder)], source="txt")["000.png"] is None
    assert set(prompts_of([str(folder)], source="none").values()) == {None}
    assert set(prompts_of([str(folder)], one="for all").values()) == {"for all"}
    table = tmp_path / "t.csv"
    table.write_text('image,caption\n002.png,"by, hand"\nsub/a_red-cat_000012.png,below\n', encoding="utf-8-sig")
    by_hand = prompts_of([str(folder)], table=PromptTable(table, None))
    assert by_hand == {"000.png": "from metadata", "001.png": "from the text", "002.png": "by, hand", key: "below"}
    assert from_name(Path("x/_.png")) is None
    with pytest.raises(DiffalignError, match="--prompt-from nmae: unknown"):
        Prompting(source="nmae")


def test_genevals_own_layout(tmp_path: Path) -> None:
    facts = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    (tmp_path / "00000" / "samples").mkdir(parents=True)
    (tmp_path / "00000" / "metadata.jsonl").write_text(json.dumps(facts))
    pictures.smooth(1).save(tmp_path / "00000" / "samples" / "0000.png")
    (item,) = collect([str(tmp_path)])
    assert item.prompt == "a photo of a bench" and item.metadata["include"] == facts["include"]


def test_globs_files_and_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures.folder(tmp_path / "a", 3)
    monkeypatch.chdir(tmp_path)
    assert [item.name for item in collect(["a/00[12].png"])] == ["a/001.png", "a/002.png"]
    assert [item.name for item in collect([str(tmp_path / "a" / "*0.png")])] == [
        (tmp_path / "a" / "000.png").as_posix()
    ]
    (item,) = collect(["a/000.png"])
    assert item.prompt == "a cat"
    pictures.smooth(1).save(tmp_path / "[odd] name?.png")
    assert collect(["[odd] name?.png"])[0].name == "[odd] name?.png"  # a file that is there is no pattern
    for sources, words in (
        ([""], "an image source is empty; name a file or folder"),
        (["nowhere"], "nowhere: no such file or folder"),
        (["a/*.tiff"], "no image in it"),
        (["a", "a/000.png"], "'a/000.png' is given twice"),
    ):
        with pytest.raises(DiffalignError, match=words):
            collect(sources)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../x.png"])
def test_metadata_may_not_leave_its_folder(tmp_path: Path, name: str) -> None:
    pictures.folder(tmp_path / "in", 1)
    (tmp_path / "in" / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    with pytest.raises(DiffalignError, match=r"metadata\.jsonl:1: file_name .* leaves its folder"):
        collect([str(tmp_path / "in")])


@pytest.mark.parametrize(
    ("text", "words"),
    [('{"file_name": "a.png"', "metadata.jsonl:1: not JSON"), ("[1]", "an object is expected"),
     ('{"file_name": "a.png"}\n{"text": "x"}', "metadata.jsonl:2: no file_name")],
)  # fmt: skip
def test_broken_metadata_is_named(tmp_path: Path, text: str, words: str) -> None:
    pictures.folder(tmp_path / "in", 1)
    (tmp_path / "in" / "metadata.jsonl").write_text(text)
    with pytest.raises(DiffalignError, match=words):
        collect([str(tmp_path / "in")])


def test_parquet_rows(tmp_path: Path) -> None:
    images = [pictures.encoded(pictures.smooth(i), "PNG") for i in range(5)]
    (tmp_path / "beside.png").write_bytes(images[3])
    rows: list[dict[str, Any]] = [
        {"image": {"bytes": data, "path": None}, "caption": f"p{i}"} for i, data in enumerate(images)
    ]
    rows[1]["image"] = {"bytes": b"broken", "path": None}
    rows[3]["image"] = {"bytes": None, "path": "beside.png"}
    rows[4]["image"] = {"bytes": None, "path": "/etc/passwd"}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("caption", pa.string())]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "p.parquet", row_group_size=2)
    items = collect([str(tmp_path / "p.parquet")])
    assert [item.prompt for item in items] == ["p0", "p1", "p2", "p3", "p4"]
    assert items[2].origin.read() == images[2] and items[3].origin.read() == images[3]
    with pytest.raises(Unreadable, match="not an image"):
        decode(items[1].origin.read())
    with pytest.raises(Unreadable, match="holds no image bytes"):
        items[4].origin.read()
    assert score(ScoreRequest([str(tmp_path / "p.parquet")], ["sharpness"], output=tmp_path / "o.jsonl")) == 3


def test_a_dataset_of_ours(tmp_path: Path) -> None:
    files = pictures.folder(tmp_path / "in", 4)
    images = [(files / f"00{2 * i}.png", files / f"00{2 * i + 1}.png") for i in range(2)]
    pairs = [ImportedGroup(f"prompt {i}", two, (1.0, 0.0), "here") for i, two in enumerate(images)]
    write_imported(pairs, tmp_path / "set")
    request = ScoreRequest([str(tmp_path / "set")], ["s=sharpness"], output=tmp_path / "o.csv", into_dataset=True)
    assert score(request) == 0
    dataset = PreferenceDataset(tmp_path / "set")
    found = dataset.scores("s")
    assert dataset.scored_by("s") == load_reward("sharpness").provenance()
    assert dataset.rewards() == ["s"]
    assert len(found) == 4
    assert all(map(math.isfinite, found.values()))
    assert sorted(found.values()) == [found[key] for key in sorted(found)]  # pictures get sharper by their number
    with pytest.raises(DiffalignError, match="must be one dataset folder"):
        score(ScoreRequest([str(files)], ["sharpness"], into_dataset=True))


def test_pixel_limits() -> None:
    data = pictures.encoded(pictures.smooth(1, 100, 100), "PNG")
    assert decode(data, max_pixels=10_000).size == (100, 100)
    with pytest.raises(Unreadable, match="100 x 100 pixels"):
        decode(data, max_pixels=9_999)


def test_against_pairs_by_name_then_by_prompt() -> None:
    prompts: list[str | None] = ["p", "p", "q", None]
    a = made([1.0, 2.0, 3.0, math.nan], prompts)
    b = made([2.0, 2.0, 2.0, 9.0], prompts, side="b")
    pairing = pair_up(a.items, b.items)
    assert pairing.how == "name"
    assert pairing.prompts == [[(0, 0), (1, 1)], [(2, 2)], [(3, 3)]]
    found = compare_scores(a, b, pairing)["r"]
    # prompt p: one win and one tie, prompt q: a loss; the NaN leaves its prompt out
    assert found.prompts == 2
    assert found.win_rate == pytest.approx((0.75 + 0) / 2)
    assert found.difference == pytest.approx((0.5 - 1) / 2)
    assert (found.low, found.high, found.win_low, found.win_high) == (None,) * 4
    other = made([5.0, 0.0], ["q", "p"], ["x.png", "y.png"], "b")
    by_prompt = pair_up(a.items, other.items)
    assert by_prompt.how == "prompt"
    assert by_prompt.prompts == [[(0, 1)], [(2, 0)]]
    assert by_prompt.unpaired == 2
    with pytest.raises(DiffalignError, match="same name or the same prompt"):
        pair_up(a.items, made([1.0], ["z"], ["z.png"], "b").items)


@pytest.mark.parametrize(
    ("theirs", "how", "pairs", "other"),
    [
        (["p0", "p1", "p2"], "name", [(0, 0), (1, 1), (2, 2)], 0),
        (["p2", "p0", "p1"], "prompt", [(0, 1), (1, 2), (2, 0)], 3),
        (["p0", "p2", "p1"], "name or prompt", [(0, 0), (1, 2), (2, 1)], 2),
        ([None, None, "p2"], "name", [(0, 0), (1, 1), (2, 2)], 0),
        (["x", "p1", "p2"], "name or prompt", [(1, 1), (2, 2)], 1),
    ],
)
def test_equal_names_with_other_prompts(
    theirs: list[str | None], how: str, pairs: list[tuple[int, int]], other: int
) -> None:
    a, b = made([1.0] * 3, ["p0", "p1", "p2"]), made([1.0] * 3, theirs, side="b")
    pairing = pair_up(a.items, b.items)
    assert pairing.how == how and pairing.other_prompt == other
    assert sorted(pair for group in pairing.prompts for pair in group) == pairs
    assert ("with different prompts" in heading(pairing)) == bool(other)


def test_against_agrees_with_evaluation() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=40), rng.normal(0.3, size=40)
    prompts: list[str | None] = [f"p{i}" for i in range(40)]
    a, b = made(x.tolist(), prompts), made(y.tolist(), prompts, side="b")
    assert compare_scores(a, b, pair_up(a.items, b.items))["r"] == compare(x[:, None], y[:, None])


def test_agreement_counts_ties(tmp_path: Path) -> None:
    scores = made([1.0, 2.0, 2.0, 4.0, math.nan], ["p", "p", "q", "q", "q"])
    path = tmp_path / "c.csv"
    path.write_text("image_a,image_b,choice\n0.png,1.png,b\n1.png,2.png,a\na/3.png,0,b\n1,3,tie\n0,4,a\n")
    choices = read_choices(path, scores)
    assert [c.human for c in choices] == [-1, 1, -1, 0, 1]
    found = agree(choices, scores, "r")
    # b right; a tie predicted (half); wrong; a human tie; the last has no score. Concordant 1, discordant 1.
    assert (found.pairs, found.human_ties, found.predicted_ties) == (3, 1, 1)
    assert found.accuracy == pytest.approx(1.5 / 3) and found.kendall == 0
    assert found.interval.words() == "too few prompts (2) for an interval"


def test_agreement_with_ratings_is_kendalls_tau_b(tmp_path: Path) -> None:
    from scipy.stats import kendalltau

    rng = np.random.default_rng(1)
    ratings, values = rng.integers(1, 6, 12), rng.integers(0, 5, 12).astype(float)
    scores = made(values.tolist(), ["p"] * 12)
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps({"image": f"{i}.png", "rating": int(r)}) + "\n" for i, r in enumerate(ratings)))
    found = agree(read_choices(path, scores), scores, "r")
    assert found.kendall == pytest.approx(kendalltau(ratings, values).statistic)


@pytest.mark.parametrize(
    ("text", "words"),
    [("image_a,image_b,choice\n0,1,c\n", "c.csv:2: choice 'c'"), ("image_a,image_b,choice\n0,9,a\n", "none of the scored"),
     ("image,rating\n0,x\n", "rating 'x' is not a number"), ("x,b\n1,2\n", "columns image_a"), ("a,b\n", "empty"),
     ("a,b\n1,2\n", "c.csv:2: column choice is missing .*; there are a, b"), ("a,b,choice\n0,0,a\n", "stands in it twice")],
)  # fmt: skip
def test_broken_labels_are_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(DiffalignError, match=words):
        read_choices(tmp_path / "c.csv", made([1.0, 2.0], ["p", "p"]))


@pytest.mark.parametrize(
    "head", ["image_a,image_b,choice", "winner,loser,note", "chosen;rejected;note", "image1,image2,label"]
)
def test_labels_name_images_as_pairs_do(tmp_path: Path, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures.folder(tmp_path / "set" / "in", 3)
    monkeypatch.chdir(tmp_path)
    mark = ";" if ";" in head else ","
    full = str(tmp_path / "set" / "in" / "002.png")
    rows = [("in/000.png", "./in/001.png", "a"), (full, "in/000.png", "a")]
    (tmp_path / "set" / "c.csv").write_text("\n".join([head, *map(mark.join, rows)]))
    items = collect(["set/in"])
    choices = read_choices(Path("set/c.csv"), Scores([], {}, items=items))
    assert [(c.a, c.b, c.human) for c in choices] == [(0, 1, 1), (2, 0, 1)]


@pytest.mark.parametrize(
    "row",
    ["000.png,001.png,left", "000.png,nowhere.png,a", "000.png,,a", "000.png"],
    ids=["choice", "image", "empty", "short"],
)
def test_labels_are_checked_before_anything_is_scored(
    tmp_path: Path, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures.folder(tmp_path / "in", 3)
    (tmp_path / "c.csv").write_text(f"image_a,image_b,choice\n{row}\n")
    monkeypatch.setattr("diffalign.stages.score.score_items", lambda *a, **k: pytest.fail("scored"))
    with pytest.raises(DiffalignError, match=r"c\.csv:2"):
        score(ScoreRequest([str(tmp_path / "in")], ["sharpness"], labels=tmp_path / "c.csv"))


def test_summary_and_choice_of_cards() -> None:
    scores = made([3.0, math.nan, 1.0, 2.0], ["p"] * 4)
    (s,) = summarise(scores)
    assert (s.scored, s.unscored, s.mean, s.best, s.worst) == (3, 1, 2.0, (3.0, "a/0.png"), (1.0, "a/2.png"))
    assert s.spread == pytest.approx(math.sqrt(2 / 3))
    assert sum(s.counts) == 3
    assert choose(scores, ["r"], 10) == [0, 3, 2, 1]
    many = made([float(i) for i in range(100)], ["p"] * 100)
    shown = choose(many, ["r"], 5)
    assert shown[0] == 99
    assert shown[-1] == 0
    assert len(shown) == 5


def test_reward_specs() -> None:
    spec = parse("hps=hpsv2:release=2.0,antialias=false,weights=/a/b.pt")
    assert (spec.label, spec.name) == ("hps", "hpsv2")
    assert spec.options == {"release": 2.0, "antialias": False, "weights": "/a/b.pt"}
    assert parse("ocr").label == "ocr" and parse("jpeg_compressibility:quality=50").options == {"quality": 50}
    for text in ("", "a b=x", "ocr:side", "ocr:=1"):
        with pytest.raises(DiffalignError, match="--reward"):
            parse(text)
    with pytest.raises(DiffalignError, match="two are called 'ocr'"):
        parse_all(["ocr", "ocr:side=256"])


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pictures.folder(tmp_path / "a", 6, ["p", "q", "r"]), pictures.folder(tmp_path / "b", 6, ["p", "q", "r"])
    (tmp_path / "labels.csv").write_text(f"image_a,image_b,choice\n{a}/000.png,{b}/003.png,b\n")
    options = ["--against", str(b), "--labels", str(tmp_path / "labels.csv"), "--html", str(tmp_path / "g.html")]
    assert run("score", str(a), "-r", "sharpness", "-r", "jpeg_compressibility", *options) == 0
    shown = capsys.readouterr().out
    for words in ("6 pairs by name, 3 prompts", "agreement with 1 human comparisons", "side by side:", "sharpness"):
        assert words in shown
    assert run("score", str(a), "-r", "sharpness", "--against", str(a)) == 2
    assert "000.png' is on both sides" in capsys.readouterr().err
    assert run("score", str(a), "-r", "sharpnes") == 2
    assert capsys.readouterr().err == "error: unknown reward 'sharpnes': did you mean 'sharpness'? [DA202]\n"
    assert run("score", str(a), "-r", "ocr:sidee=1") == 2
    assert "unknown option 'sidee'; did you mean 'side'?" in capsys.readouterr().err
    assert run("score", str(a), "-r", "ocr", "--prompt", "no quotes") == 3
    assert "double quotes" in capsys.readouterr().err
    (a / "000.png").write_bytes(b"")
    assert run("score", str(a), "-r", "sharpness") == 3
    assert run("rewards") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("pickscore", "hpsv2", "geneval", "Apache-2.0", "[ocr]"))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 40])
def test_one_reason_of_many_images_is_one_line(count: int) -> None:
    scores = made([math.nan] * count, ["p"] * count)
    for row in scores.rows:
        row["r.reason"] = "no text in straight double quotes"
    counted = f"{count} x no text in straight double quotes; the first is a/0.png"
    assert faults(scores) == [counted if count > 1 else "a/0.png: no text in straight double quotes"]


@pytest.mark.parametrize(
    ("reasons", "lines"),
    [
        (["x", "y", "x", "y", "x"], ["3 x x; the first is a/0.png", "2 x y; the first is a/1.png"]),
        (["", "x", "", "", ""], ["a/1.png: x"]),
        (
            [f"reason {i}" for i in range(14)],
            [*(f"a/{i}.png: reason {i}" for i in range(10)), "... and 4 more reasons"],
        ),
        (["bell \a", "bell \a"], ["2 x bell \\x07; the first is a/0.png"]),
    ],
)
def test_reasons_are_counted(reasons: list[str], lines: list[str]) -> None:
    scores = made([math.nan if reason else 1.0 for reason in reasons], ["p"] * len(reasons))
    for row, reason in zip(scores.rows, reasons, strict=True):
        row["r.reason"] = reason
    assert faults(scores) == lines


def test_a_reason_names_its_reward_and_an_unreadable_image_is_one_reason() -> None:
    scores = made([math.nan, 1.0], ["p", "p"])
    scores.columns["s"] = ("s",)
    for row in scores.rows:
        row |= {"s": math.nan, "s.reason": "no quotes"}
    scores.rows[0]["reason"] = "empty file"
    assert faults(scores) == ["a/0.png: empty file", "a/1.png: s: no quotes"]
