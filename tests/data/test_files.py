"""Small files: complete or not there, rows up to a step, and progress lines that count from where the work began."""

from pathlib import Path

import pytest

from diffalign import progress
from diffalign.errors import DiffalignError
from diffalign.files import dotted_keys, free_bytes, read_json, read_json_lines, replacing, write_whole


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_whole(path, "old ü")
    with pytest.raises(RuntimeError), replacing(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "old ü"
    assert list(path.parent.iterdir()) == [path]


def test_rows_up_to_a_step_without_the_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_json_lines(path) == []
    path.write_text('{"step": 1, "text": "a\u2028b"}\n\n{"step": 2}\n{"step": 3, "lo', encoding="utf-8")
    assert read_json_lines(path) == [{"step": 1, "text": "a\u2028b"}, {"step": 2}]
    assert [row["step"] for row in read_json_lines(path, last_step=1)] == [1]


def test_damaged_json_names_the_file(tmp_path: Path) -> None:
    assert read_json(tmp_path / "a.json", "delete it") is None
    for text in ("", "{", "[1", "\x00", "{}", "[]", "3", "null"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DiffalignError, match=r"a\.json cannot be read \(.*\); delete it$"):
            read_json(tmp_path / "a.json", "delete it", "key")
    (tmp_path / "a.json").write_text("3")
    assert read_json(tmp_path / "a.json", "delete it") == 3


@pytest.mark.parametrize("line", ["null", "3", "[]", "{}", '"a"', '{"step": "1"}', '{"step": null}', "{", "[[["])
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(DiffalignError, match=r"metrics\.jsonl:2 cannot be read \(.+\); delete this line$"):
        read_json_lines(path)


def test_nested_keys_become_dotted_and_empty_mappings_vanish() -> None:
    assert dotted_keys({"a": {"b": 1, "c": {"d": [2]}}, "e": {}, "f": None}) == {"a.b": 1, "a.c.d": [2], "f": None}


def test_space_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") > 0


def test_progress_counts_from_the_first_call_for_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    show = progress.ImageProgress(lines.append, every=10.0)
    for second, what, done in ((0, "a", 6), (4, "a", 8), (12, "a", 10), (14, "a", 16), (14, "b", 0), (30, "b", 4)):
        now[0] = second
        show(what, done, 16)
    assert lines == ["a: 10/16 images, 3.000 s each", "a: 16/16 images, 1.400 s each", "b: 4/16 images, 4.000 s each"]
