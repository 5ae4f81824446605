"""Deep nesting, huge numbers, aliases, NUL and lone surrogates: a config gets one line, a table loses the row alone."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.config import load
from diffalign.config.document import Document, apply_override
from diffalign.data.convert import open_rows
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.imported import Report, write_imported
from diffalign.data.prompts import read_prompts
from diffalign.data.prompts_beside import prompt_beside
from diffalign.data.suites import read_suite
from diffalign.data.tables import table_rows
from diffalign.errors import DiffalignError
from diffalign.files import read_json, read_json_lines
from diffalign.files.parse import MAX_DEPTH, json_entries, parse_json, parse_yaml
from diffalign.pipelines.loading import read_index
from diffalign.report.model_card import front_matter
from diffalign.report.runs import read_run
from diffalign.rewards.judge_prompt import load_settings
from diffalign.scoring.sources import collect
from diffalign.scoring.store import Store
from helpers import pictures
from helpers.command_line import run

DEPTHS = [MAX_DEPTH + 1, 900, 5000, 100_000]
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join('*' + chr(97 + n) for _ in range(9))}]\n" for n in range(9)
)


def deep(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


def one_line(call: Callable[[], Any]) -> str:
    started = time.monotonic()
    with pytest.raises(DiffalignError) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert time.monotonic() - started < 10
    return str(caught.value)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"b":', "}]")])
def test_json_is_bounded(depth: int, opening: str, closing: str) -> None:
    inner = opening * depth + "1" + closing * depth
    with pytest.raises(ValueError, match="nested more than"):
        parse_json(inner)
    levels = MAX_DEPTH // (2 if opening.startswith("[{") else 1)
    parse_json(opening * levels + "1" + closing * levels)


def test_numbers_of_json() -> None:
    assert parse_json("[1, -2, 18446744073709551616]") == [1, -2, 2**64]
    assert parse_json("9" * 400) == parse_json("9" * 5000) == float("inf")
    assert parse_json("-" + "9" * 400) == -float("inf")
    assert parse_json('"\\ud800a\\ud83d\\ude00"') == "\\ud800a\U0001f600"
    assert parse_json('{"\\udfff": ["\\uD800"]}') == {"\\udfff": ["\\ud800"]}


def test_entries_of_a_list() -> None:
    text = ' [1, "a,]\\"[", {"b": [2, 3]}, [[]], "" ] '
    assert [json.loads(one) for one in json_entries(text)] == json.loads(text)
    assert list(json_entries("[]")) == []


# --- YAML --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "model: {path: x}\n" + LAUGHS,
        "tune:\n" + "".join(f"  {line}\n" for line in LAUGHS.splitlines()),
        *(deep(depth) for depth in DEPTHS),
        *("{a: " * depth + "}" * depth for depth in DEPTHS),
        "a: " + "- " * 3000 + "1",
        "a: &a [*a]",
        "&a {b: {c: *a}}",
        "a: !!timestamp x",
        "a: !!bool perhaps",
        "a: !!int ''",
        "a: !!float x:y",
        "a: " + "9" * 5000,
        "a: !!python/object/apply:os.system [ls]",
        "a: !!binary '#'",
        "? [a]\n: b",
        "a: \x07",
        "a: b\na: c",
        "x" * 3_000_000,
    ],
)
def test_configs_are_bounded(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    one_line(lambda: load("train", path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "run" / "config.yaml").write_text(text)
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
    assert isinstance(front_matter(tmp_path / "README.md"), dict)
    try:
        read_run(tmp_path / "run")
    except DiffalignError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "value", [deep(101), deep(5000), "{a: " * 5000, LAUGHS, "&a [*a]", "!!timestamp x", "9" * 5000]
)
def test_overrides_are_bounded(value: str) -> None:
    one_line(lambda: apply_override(Document({}, ""), f"model.options={value}"))


def test_long_dotted_keys_are_refused() -> None:
    one_line(lambda: apply_override(Document({}, ""), ".".join("a" * 5000) + "=1"))


def test_aliases_that_do_not_grow_are_read() -> None:
    assert parse_yaml("a: &a {b: [1, 2]}\nc: *a\nd: [*a, *a]", "x")["d"][1] == {"b": [1, 2]}
    assert parse_yaml("", "x") is None


# --- rows ----------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "a cat", "winner": "a.png", "loser": "b.png"}
BAD_ROWS = [
    '{"prompt": ' + deep(101) + ', "winner": "a.png", "loser": "b.png"}',
    '{"prompt": "x", "extra": ' + deep(5000) + ', "winner": "a.png", "loser": "b.png"}',
    '{"prompt": "x", "winner": "a\\u0000.png", "loser": "b.png"}',
    '{"prompt": "x", "winner": ["a.png"], "loser": "b.png"}',
    '{"prompt": "x", "winner": {"path": 3}, "loser": "b.png"}',
    json.dumps({"prompt": "x", "winner": "a" * 300 + ".png", "loser": "b.png"}),
    json.dumps({"prompt": "x", "winner": "a/" * 3000 + "a.png", "loser": "b.png"}),
    '{"prompt": "x", "winner": "\\ud800.png", "loser": "b.png"}',
    '{"prompt": 5, "winner": "a.png", "loser": "b.png"}',
    '{"prompt": "x", "images": ["a.png", "b.png"], "preference": [1, ' + "9" * 400 + "]}",
    '{"prompt": "x", "images": ["a.png", 7], "preference": [1, 0]}',
    '{"prompt": "x", "images": ["a.png", "b.png"], "ranking": [1, NaN]}',
    "[]",
    "7",
    "nul",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n, name in enumerate(("a", "b")):
        pictures.smooth(n).save(tmp_path / f"{name}.png")
    return tmp_path


def converted(path: Path) -> Report:
    return write_imported(open_rows([path], None)[1], path.parent / "out")


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
@pytest.mark.parametrize("number", range(len(BAD_ROWS)))
def test_a_row_costs_itself(folder: Path, ending: str, number: int) -> None:
    rows = [json.dumps(GOOD), BAD_ROWS[number], json.dumps({**GOOD, "prompt": "\ud800 a dog"})]
    if ending == ".json" and BAD_ROWS[number] == "nul":
        pytest.skip("what is no JSON at all has no rows")
    text = "\n".join(rows) if ending == ".jsonl" else f"[{','.join(rows)}]"
    (folder / f"t{ending}").write_text(text)
    report = converted(folder / f"t{ending}")
    # A label that is no finite number is absent, which is counted and no fault.
    assert (report.groups, len(report.faults) + sum(report.counted.values())) == (2, 1)
    assert PreferenceDataset(folder / "out").column("prompt") == ["a cat", "\\ud800 a dog"]


@pytest.mark.parametrize(
    "row",
    [
        {"file_name": "a\0.png"}, {"file_name": ["a.png"]}, {"chosen_file_name": ["a.png"], "rejected_file_name": "b.png"},
        {"chosen_file_name": 5, "rejected_file_name": "b.png"}, {"file_name": "a.png", "score": float("inf")},
        {"file_name": "x" * 300}, {"file_name": "a.png", "split": "../x"}, {"file_name": "a.png", "rank": []},
    ],
)  # fmt: skip
def test_a_row_of_metadata_costs_its_group(folder: Path, row: dict[str, Any]) -> None:
    good = [{"file_name": f"{name}.png", "prompt": "good", "score": n} for n, name in enumerate("ab")]
    bad = [{"prompt": "bad", **row}, {"prompt": "bad", "file_name": "b.png", "score": 1.0}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, [*good, *bad])))
    report = converted(folder / "metadata.jsonl")
    # What is left of the bad group may still be a group: of one image, or without a preference.
    assert "good" in PreferenceDataset(folder / "out").column("prompt") and report.groups <= 2


@pytest.mark.parametrize(
    "row",
    [
        {"rank": [1, float("inf")]}, {"rank": [1, 10**400]}, {"rank": [1, float("nan")]}, {"human_preference": [1, 10**400]},
        {"image_path": ["a\0.png", "b.png"]}, {"image_path": ["a" * 300, "b.png"]}, {"image_path": [["a.png"], "b.png"]},
        {"prompt": ["x"]}, {"rank": [1, "x"]},
    ],
)  # fmt: skip
def test_a_row_of_hpdv2_costs_itself(folder: Path, row: dict[str, Any]) -> None:
    good = {"prompt": "a cat", "image_path": ["a.png", "b.png"], "rank": [1, 2]}
    bad = {**good, **row}
    if "human_preference" in row:
        del bad["rank"]
    (folder / "test.json").write_text(json.dumps([good, bad]))
    report = converted(folder / "test.json")
    assert (report.groups, len(report.faults) + sum(report.counted.values())) == (1, 1)


def test_values_of_parquet_that_python_lacks(folder: Path) -> None:
    data = (folder / "a.png").read_bytes()
    table = pa.table(
        {
            "prompt": ["a cat"], "winner": [data], "loser": [(folder / "b.png").read_bytes()],
            "when": pa.array([2**62], pa.int64()).view(pa.timestamp("us")),
        }
    )  # fmt: skip
    pq.write_table(table, folder / "t.parquet")
    one_line(lambda: converted(folder / "t.parquet"))
    pq.write_table(table.rename_columns(["caption", "image", "x", "when"]), folder / "s.parquet")
    assert run("score", folder / "s.parquet", "-r", "sharpness") == 0  # which reads the image alone
    (item,) = collect([str(folder / "s.parquet")])
    assert item.prompt is None and item.fault.startswith("cannot be read (")


def test_metadata_of_any_type_is_kept_as_text(folder: Path) -> None:
    rows = [
        {"file_name": f"{name}.png", "prompt": "x", "score": n, "when": datetime.date(2020, 1, 1), "raw": b"\xff"}
        for n, name in enumerate("ab")
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    assert converted(folder / "metadata.parquet").groups == 1
    assert PreferenceDataset(folder / "out").group(0)["metadata"]["when"] == "2020-01-01"


@pytest.mark.parametrize("cell", [{"path": "a.png"}, {}, None, {"bytes": None}, {"bytes": b""}])
def test_structs_without_bytes(folder: Path, cell: dict[str, Any] | None) -> None:
    good = (folder / "a.png").read_bytes()
    rows = [
        {"caption": f"p{n}", "jpg_0": {"bytes": good, "path": None}, "jpg_1": one, "label_0": 1.0, "label_1": 0.0}
        for n, one in enumerate(({"bytes": good, "path": None}, cell))
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    report = converted(folder / "train.parquet")
    assert (report.groups, len(report.faults)) == (1, 1)
    for names in (["caption", "label_0", "label_1"],):
        table = pa.Table.from_pylist([{**dict.fromkeys(names, "x"), "jpg_0": {"path": "a"}, "jpg_1": {"path": "b"}}])
        pq.write_table(table, folder / "only.parquet")
        one_line(lambda: write_imported(open_rows([folder / "only.parquet"], "pickapic")[1], folder / "out2"))


# --- all other readers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_reader_of_json_is_bounded(tmp_path: Path, depth: int) -> None:
    text = '{"a": ' + deep(depth) + "}"
    names = ("a.json", "model_index.json", "judge.json", "s.jsonl", "anime.json", "p.jsonl", "x.json")
    for name in names:
        (tmp_path / name).write_text(text)
    assert read_json_lines(tmp_path / "s.jsonl") == []
    one_line(lambda: read_json(tmp_path / "a.json"))
    one_line(lambda: read_index("model", tmp_path / "model_index.json"))
    one_line(lambda: read_prompts(tmp_path / "p.jsonl"))
    one_line(lambda: Store(tmp_path / "s.jsonl"))
    one_line(lambda: read_suite("hpsv2", tmp_path))
    assert all(isinstance(row, str) for _, row in table_rows(tmp_path / "s.jsonl"))
    (tmp_path / "x.png").write_bytes(b"")
    prompt, fault = prompt_beside(tmp_path / "x.png")
    assert prompt is None and "nested more than" in fault
    folder = tmp_path / "judge"
    folder.mkdir()
    from diffalign.rewards.judge_prompt import SETTINGS

    (folder / SETTINGS).write_text(text)
    one_line(lambda: load_settings(folder))
