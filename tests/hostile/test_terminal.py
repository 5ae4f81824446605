"""No text from files or arguments reaches the terminal with control characters, whoever prints it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from diffalign.cli.terminal import guard_libraries
from diffalign.config.document import dump
from diffalign.errors import DiffalignError
from diffalign.progress import say, say_aside, say_block, visible
from diffalign.terminal import show_table
from helpers import pictures
from helpers.command_line import run

EVIL = [
    "\x1b[2J",
    "\x1b]0;title\x07",
    "a\rb",
    "\x9b31m",
    "\u202eabc",
    "\u2066x",
    "a\u2028b",
    "\x00",
    "\ud800",
    "\x08\x7f",
]
EVIL += ["\ufeff", "\U000e0041", "\u200b"]
IN_NAMES = "".join(e for e in EVIL if e not in ("\x00", "\ud800"))
FRIENDLY = "größe 大 🐈 👩\u200d🚀 می\u200cخواهم \xad ±×→"


def is_clean(text: str, keep: str = "\n\t") -> bool:
    """Return whether nothing in a text moves a cursor, rings or turns: by the categories of Unicode, not by our list."""
    bad = {
        c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(c) in BIDI
    }
    return not bad - set(keep)


BIDI = ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")


@pytest.mark.parametrize("evil", EVIL)
def test_evil_text_becomes_an_escape(evil: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_clean(visible(evil), keep="") and visible(evil) != evil
    say(f"a{evil}\nb")
    say_aside(f"a{evil}\nb")
    out, err = capsys.readouterr()
    assert out == err and out.count("\n") == 1 and is_clean(out)
    say_block(f"a{evil}\n\tb\n")
    assert is_clean(capsys.readouterr().out)
    table = Table(title=Text(evil))
    table.add_column(Text(evil))
    table.add_row(Text(f"{evil}{FRIENDLY}"))
    show_table(table, 80)
    assert is_clean(capsys.readouterr().out)


def test_every_character_of_unicode() -> None:
    text = "".join(map(chr, range(sys.maxunicode + 1)))
    assert is_clean(visible(text), keep="")


def test_friendly_text_stays(capsys: pytest.CaptureFixture[str]) -> None:
    assert visible(FRIENDLY) == FRIENDLY
    say_block("a\n\tb\n")
    assert capsys.readouterr().out == "a\n\tb\n\n"


def test_a_table_is_as_rich_draws_it(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    table = Table(title="t", title_justify="left")
    table.add_column("a")
    table.add_column("b", justify="right")
    table.add_row(FRIENDLY, "[bold]1")
    Console(width=60).print(table)
    expected = capsys.readouterr().out
    show_table(table, 60)
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("evil", [IN_NAMES, "\x1b[2J", "\u202e"])
def test_every_verb_with_evil_text(tmp_path: Path, evil: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / f"d{evil}"
    folder.mkdir()
    for n, name in enumerate((f"a{evil}.png", "b.png")):
        pictures.smooth(n).save(folder / name)
    (folder / f"c{evil}.png").write_bytes(b"nothing")
    (folder / f"x.y{evil}").write_bytes(b"")
    rows = [
        {"prompt": "p", "winner": f"a{evil}.png", "loser": "b.png", "split": f"s{evil}"},
        {"prompt": f"p{evil}", "winner": f"a{evil}.png", "loser": "b.png"},
        {"prompt": "p", "winner": f"n{evil}.png", "loser": "b.png"},
    ]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "bad.jsonl").write_text(json.dumps({f"k{evil}": 1}))
    (folder / "c.yaml").write_text(dump({f"k{evil}": {"x": 1}}))
    (folder / "p.jsonl").write_text(json.dumps({"prompt": f"p{evil}"}))
    (folder / "model").mkdir()
    (folder / "model" / "model_index.json").write_text(json.dumps({"_class_name": f"C{evil}"}))
    commands: list[tuple[object, ...]] = [
        ("score", folder, "-r", "sharpness", "-o", tmp_path / "s.jsonl", "--html", tmp_path / "s.html"),
        ("score", folder / f"no{evil}", "-r", "sharpness"),
        ("score", folder, "-r", f"no{evil}"),
        ("score", folder / "b.png", "-r", "sharpness", "--prompts", folder / "t.jsonl"),
        ("data", "convert", folder / "t.jsonl", "--out", folder / "out"),
        ("data", "inspect", folder / "out"),
        ("data", "inspect", folder / "none"),
        ("data", "export", folder / "out", "--out", folder / "export"),
        ("data", "convert", folder / "bad.jsonl", "--out", folder / "out2"),
        ("pairs", folder / "t.jsonl", "--out", folder / "out3"),
        ("pairs", folder / "t.jsonl", "--out", folder / "out4", "--split", f"a{evil}=0.1"),
        ("train", folder / "c.yaml"),
        ("train", f"no{evil}"),
        (
            "train",
            "sd3_rankdpo",
            f"model.path={json.dumps(str(folder / 'model'))}",
            f"data.path={json.dumps(str(folder))}",
        ),
        ("train", "sd3_rankdpo", f"tune.x{evil}=1"),
        ("train", "sd3_rankdpo", f"tune.kind={json.dumps(evil)}"),
        ("sample", folder / "c.yaml", f"prompts={json.dumps(str(folder / 'p.jsonl'))}"),
        ("rank", folder / "out", f"sources=[{json.dumps(evil)}]"),
        ("recipes", folder / "c.yaml"),
        ("report", folder),
    ]
    for command in commands:
        code = run(*command)
        out, err = capsys.readouterr()
        assert code in (0, 2, 3), command
        assert is_clean(out) and is_clean(err), command
        assert code != 2 or len(err.strip().splitlines()) == 1, (command, err)


def test_libraries_print_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogRecordFactory(), warnings.formatwarning
    try:
        guard_libraries()
        handler = logging.StreamHandler(sys.stderr)
        logger = logging.getLogger("some.library")
        logger.addHandler(handler)
        logger.warning("\x1b[1mbold\x1b[0m\n%s %s", "\x1b[2J\x07", "x" * 100_000)
        sys.stderr.write(warnings.formatwarning("a\r\nb\x9b" + "y" * 100_000, UserWarning, "f", 1))
        logger.removeHandler(handler)
    finally:
        logging.setLogRecordFactory(before[0])
        warnings.formatwarning = before[1]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("bold \\x1b[2J\\x07 xxx")
    assert all(is_clean(line) and len(line) < 1100 for line in lines)


def test_an_encoding_that_lacks_a_character(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"k大": 1}')
    command = [
        sys.executable,
        "-m",
        "diffalign",
        "data",
        "convert",
        str(tmp_path / "p.jsonl"),
        "--out",
        str(tmp_path / "o"),
    ]
    ended = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False)
    assert ended.returncode == 2 and b"\\u5927" in ended.stderr and b"Traceback" not in ended.stderr
    recipe = tmp_path / "c.yaml"
    recipe.write_text(
        "kind: rank\ndata: d # größe 大\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "diffalign", "recipes", str(recipe)]
    ended = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False)
    assert ended.returncode == 0 and b"\\u5927" in ended.stdout


def test_an_error_is_one_line_whatever_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    from diffalign.cli.errors import plain_errors

    with pytest.raises(typer.Exit), plain_errors():
        raise DiffalignError("a\nb\r\u2028c\x1b[31m")
    assert capsys.readouterr().err == "error: a b c\\x1b[31m [DA100]\n"
