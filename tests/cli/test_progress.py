"""Bars on a terminal: the count and the time left stay whole, and nothing is left behind."""

from __future__ import annotations

import gc
import io
import re

import pytest
from rich.console import Console

from diffalign import progress
from diffalign.progress import ImageProgress, progress_bar
from diffalign.training.progress import describe

TEXT = describe({"loss": 0.6712, "student_loss": 0.1, "margin": 0.042, "accuracy": 0.62, "reward": 0.3}, 12.34)


class Terminal(Console):
    """A terminal of some columns that keeps what is written to it."""

    def __init__(self, width: int) -> None:
        self.kept = io.StringIO()
        super().__init__(file=self.kept, force_terminal=True, width=width)

    @property
    def written(self) -> str:
        return self.kept.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 140])
@pytest.mark.parametrize(("done", "total"), [(7, 30), (1234, 2000), (98765, 100000)])
def test_the_count_and_the_time_left_are_never_cut(width: int, done: int, total: int) -> None:
    terminal = Terminal(width)
    bar = progress_bar(terminal, "train", 0, total)
    bar.update(bar.task_ids[0], completed=done, text=TEXT)
    (line,) = "".join(s.text for s in terminal.render(bar.get_renderable())).splitlines()
    assert re.search(rf"\b{done}/{total}\b", line) and re.search(r"-:--:--|\d:\d\d:\d\d", line), line
    assert len(line) <= width and (TEXT in line or "…" in line)
    assert line.index(f"{done}/{total}") < line.index("━")  # before the bar and the text


@pytest.mark.parametrize(
    "what", ["sampling", "[red]a reward", "a name that is much longer than the column " * 3, "bell\a"]
)
def test_images_have_a_bar_on_a_terminal(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    terminal, said = Terminal(80), []
    show = ImageProgress(said.append, console=terminal)
    for done in range(5):
        now[0] += 20.0
        show(what, done, 4)
    assert said == [f"{what}: 4/4 images, 20.000 s each"]  # no line every 15 seconds beside the bar
    assert "\a" not in terminal.written and "4/4" in terminal.written
    assert terminal.written.rstrip().endswith("\x1b[2K") or "\x1b[?25h" in terminal.written  # the cursor is back


@pytest.mark.parametrize("calls", [[("a", 0, 4), ("a", 1, 4)], [("a", 0, 2), ("b", 0, 2)], [("a", 3, 4), ("a", 0, 4)]])
def test_an_error_leaves_the_terminal_with_its_cursor(calls: list[tuple[str, int, int]]) -> None:
    terminal = Terminal(80)
    show = ImageProgress(lambda line: None, console=terminal)
    for call in calls:
        show(*call)
    assert terminal.written.count("\x1b[?25l") == terminal.written.count("\x1b[?25h") + 1
    del show
    gc.collect()
    assert terminal.written.count("\x1b[?25l") == terminal.written.count("\x1b[?25h")


def test_without_a_terminal_there_are_lines_and_no_bar() -> None:
    pipe, said = Console(file=io.StringIO(), force_terminal=False), []
    show = ImageProgress(said.append, every=0.0, console=pipe)
    for done in range(3):
        show("sampling", done, 2)
    assert [line.split(",")[0] for line in said] == ["sampling: 1/2 images", "sampling: 2/2 images"]
    assert isinstance(pipe.file, io.StringIO) and pipe.file.getvalue() == ""


def test_what_exists_already_has_no_bar() -> None:
    terminal, said = Terminal(80), []
    ImageProgress(said.append, console=terminal)("sampling", 4, 4)
    assert not said and terminal.written == ""


def test_other_processes_draw_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    terminal, said = Terminal(80), []
    show = ImageProgress(said.append, console=terminal, unit="groups", closing=False)
    for done in range(3):
        show("encoding", done, 2)
    assert terminal.written == "" and said == []


def test_loading_is_a_line_where_it_took_long_and_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for seconds in (1.0, 7.0):
        with progress.waiting_for("loading a model", said.append):
            now[0] += seconds
    assert said == ["loading a model: 7 s"]


def test_loading_shows_the_seconds_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with pytest.raises(KeyboardInterrupt), progress.waiting_for("loading [a] model\a"):
        raise KeyboardInterrupt
    written = capsys.readouterr().err
    assert "loading [a] model" in written and "0:00:0" in written and "\a" not in written
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1  # the cursor is back


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("one two three four five six seven", ["one two three four", "five six seven"]),
        ("#   peak: 3 GiB of a large step", ["#   peak: 3 GiB of a", "#     large step"]),
        ("see data/a-long-folder/with-a-long-name now", ["see", "data/a-long-folder/with-a-long-name", "now"]),
        ("a  b", ["a  b"]),
        ("", [""]),
    ],
)
def test_a_terminal_breaks_messages_between_words(
    line: str, shown: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress.say(line)
    assert capsys.readouterr().out == f"{line}\n"  # whole in a pipe
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(progress.sys.stdout, "isatty", lambda: True)
    progress.say(line)
    assert capsys.readouterr().out.splitlines() == shown
