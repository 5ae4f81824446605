"""The help: verbs in groups, examples that the parser takes, and what the shell completes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from diffalign.cli import app
from diffalign.cli.complete import config_keys, config_names, reward_names
from diffalign.cli.help import EXAMPLES, GROUPS
from diffalign.config import KINDS, load_for, recipes
from helpers.command_line import run

ROOT = typer.main.get_command(app)


def verbs(command: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every verb below a group with its full name."""
    for name, one in command.commands.items():
        if hasattr(one, "commands"):
            yield from verbs(one, f"{above}{name} ")
        else:
            yield f"{above}{name}", one


def test_each_verb_stands_in_one_group() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(ROOT.commands)


def test_help_shows_the_groups_with_whole_sentences(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    for heading, names in GROUPS.items():
        first = lines.index(f"{heading}:") + 1
        for line, name in zip(lines[first:], names, strict=False):
            assert line.split()[0] == name and line.endswith(".") and len(line) <= 80


def test_every_verb_shows_its_examples(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert dict(verbs(ROOT)).keys() == EXAMPLES.keys()
    monkeypatch.setenv("COLUMNS", "80")
    assert run("train", "--help") == 0
    shown = capsys.readouterr().out
    assert "  Examples:\n" in shown and f"    diffalign {EXAMPLES['train'][0]}\n" in shown


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_examples_are_read(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the parser; and where a recipe is named, the config with the arguments is checked."""
    monkeypatch.chdir(tmp_path)
    command, arguments = ROOT, shlex.split(line.partition(" > ")[0])
    context = ROOT.make_context("diffalign", list(arguments), resilient_parsing=True)
    verb = ""
    while hasattr(command, "commands"):
        if arguments[0] not in command.commands:  # `bench MODEL` is `bench run MODEL`
            arguments = [command.default, *arguments]
        name, command, arguments = command.resolve_command(context, arguments)
        verb = f"{verb} {name}".strip()
    parsed = command.make_context(verb, list(arguments), parent=context).params
    source = parsed.get("config") or parsed.get("source")
    kind = {"cache": "train", "judge train": "judge"}.get(verb, verb)
    if kind in KINDS and source in recipes():
        load_for(kind, source, parsed["overrides"] or ())


def test_what_the_shell_completes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sdxl_mine.yaml").write_text("")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    assert {"sdxl_dpo", "sdxl_mine.yaml"} <= set(config_names("sdxl_"))
    assert config_names("ru") == ["runs/"] and config_names("runs/") == ["runs/a/"]
    assert reward_names("pick") == ["pickscore"]
    above = ROOT.make_context("diffalign", ["train"], resilient_parsing=True)
    context = ROOT.commands["train"].make_context("train", ["x"], parent=above)
    assert "train.steps=" in config_keys(context, "train.st") and not config_keys(context, "train.steps=4")
    assert "train.groups_per_step=" in config_keys(context, "train.")
    judge = ROOT.commands["judge"].make_context("judge", ["train", "x"], parent=above)
    context = ROOT.commands["judge"].commands["train"].make_context("train", ["x"], parent=judge)
    assert "train.records_per_step=" in config_keys(context, "train.")


def test_completion_in_a_shell(tmp_path: Path) -> None:
    """As bash asks for it: by two variables, with the words typed so far."""
    environment = {
        **os.environ,
        "_DIFFALIGN_COMPLETE": "complete_bash",
        "COMP_WORDS": "diffalign tra",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", "from diffalign.cli import app; app(prog_name='diffalign')"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.stdout.split() == ["train"], done.stderr


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("gdnm", "GNDM is a method of `diffalign distill`"),
        ("dmd2", "DMD2 is a method of `diffalign distill`"),
        ("dpo", "dpo is an objective of `diffalign train`"),
    ],
)
def test_methods_are_no_verbs(verb: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb, "--dry-run") == 2
    assert said in " ".join(capsys.readouterr().err.split())
