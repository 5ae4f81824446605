"""Small files: complete or not there, rows up to a step, and progress lines that count from where the work began."""

from pathlib import Path

import pytest

from diffalign import progress
from diffalign.errors import DiffalignError
from diffalign.files import (
    dotted_keys,
    free_bytes,
    read_json,
    read_json_lines,
    replacing,
    replacing_folder,
    write_whole,
)
from helpers.files import tree


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


def write_two(folder: Path, content: str, fail: bool = False) -> None:
    with replacing_folder(folder) as part:
        (part / "deep").mkdir()
        (part / "deep/a.txt").write_text(content)
        if fail:
            raise KeyboardInterrupt
        (part / "b.txt").write_text(content)


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_two(tmp_path / "weights", "1", fail=True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "weights.part").mkdir()
    (tmp_path / "weights.part/left by a kill").touch()
    write_two(tmp_path / "weights", "2")
    assert tree(tmp_path) == {"weights/b.txt": b"2", "weights/deep/a.txt": b"2"}


def test_files_of_a_folder_are_replaced_and_others_stay(tmp_path: Path) -> None:
    write_two(tmp_path, "1")
    (tmp_path / "deep/mine").touch()
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_two(tmp_path, "2", fail=True)
    assert tree(tmp_path) == before
    write_two(tmp_path, "2")
    assert tree(tmp_path) == {"b.txt": b"2", "deep/a.txt": b"2", "deep/mine": b""}


def test_weights_are_whole_or_not_there(tmp_path: Path, sdxl_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffalign.pipelines import load_backbone

    backbone = load_backbone(sdxl_dir)
    backbone.add_lora(2, 2.0)

    def half(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("diffalign.pipelines.adapters.write_lora", half)
    with pytest.raises(KeyboardInterrupt):
        backbone.save_weights(tmp_path / "weights")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    backbone.save_weights(tmp_path / "weights")
    assert list(tree(tmp_path)) == ["weights/pytorch_lora_weights.safetensors"]


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
