"""Words and tables for a terminal of 80 columns: numbers stay whole, long paths lose their beginning, and nothing is markup."""

import math
import re
import sys
from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from diffalign.progress import visible

LONGEST_NAME = 26
"""Characters of a row's name in one line, so that the numbers beside it stay whole."""
PIPE = 120
"""Columns where the output is no terminal: rich would take a pipe for 80."""


def show_table(table: Table, width: int = PIPE) -> None:
    """Print a table as wide as the terminal, or `width` columns wide where there is none."""
    console = Console(width=None if sys.stdout.isatty() else width)
    # Cells hold names and prompts, and rich lets an escape sequence in them pass.
    shown = [s if s.control else Segment(visible(s.text, keep="\n"), s.style) for s in console.render(table)]
    console.print(Segments(shown), end="")


def plain_table(first: str, *numbers: str, title: str | None = None) -> Table:
    """Return a table without rules: a column of names, then columns of numbers, aligned to the right.

    Names and numbers are never split. Where a terminal is narrow, intervals wrap between words, since they may be words.
    """
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, title=title and Text(title), title_justify="left")
    shown.add_column(first, no_wrap=True)
    for name in numbers:
        shown.add_column(name, justify="right", no_wrap="interval" not in name)
    return shown


def name_cell(name: str) -> Text:
    """Return a row's name as text, never markup. A very long one breaks into lines, behind a mark where there is one."""
    lines = []
    while len(name) > LONGEST_NAME:
        cut = 1 + max(name.rfind(mark, LONGEST_NAME // 2, LONGEST_NAME) for mark in " _.-:")
        cut = cut or LONGEST_NAME
        lines.append(name[:cut].rstrip())
        name = name[cut:]
    return Text("\n".join([*lines, name]))


def number(value: float, form: str = ".4f") -> str:
    """Return a number in this format, and a dash for one that is not there."""
    return f"{value:{form}}" if math.isfinite(value) else "–"


def counted(number: int, noun: str) -> str:
    """Return `1 tie` or `2 ties`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def shortened(text: str, width: int) -> str:
    """Return a name in at most `width` columns: its end, which tells files apart, behind an ellipsis."""
    if cell_len(text) <= width:
        return text
    while text and cell_len(text) > width - 1:
        text = text[1:]
    return "…" + text


class NameCell:
    """A cell of a number and a name, in one line: the name is shortened to the column."""

    def __init__(self, lead: str, name: str) -> None:
        self.lead, self.name = lead, visible(name)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        room = max(1, options.max_width - cell_len(self.lead) - 1)
        yield Segment(f"{self.lead} {shortened(self.name, room)}\n")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        full = cell_len(self.lead) + 1 + cell_len(self.name)
        return Measurement(min(full, cell_len(self.lead) + 13), full)


class WordsCell:
    """A cell of words, some of them addresses: lines end at blanks, and only in a word too long for one behind a slash."""

    def __init__(self, text: str) -> None:
        self.text = visible(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for line in _wrapped(self.text, max(1, options.max_width)):
            yield Segment(f"{line}\n")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max((cell_len(part) for part in re.split(r"(?<=/)|\s", self.text)), default=1)
        return Measurement(longest, cell_len(self.text))


def _wrapped(text: str, width: int) -> list[str]:
    """Return words in lines of at most `width` columns."""
    lines = [""]
    for word in text.split():
        if lines[-1] and cell_len(lines[-1]) + 1 + cell_len(word) <= width:
            lines[-1] += f" {word}"
            continue
        lines += [""] if lines[-1] else []
        for part in [word] if cell_len(word) <= width else re.split("(?<=/)", word):
            lines += [""] if lines[-1] and cell_len(lines[-1] + part) > width else []
            while cell_len(part) > width:
                lines[-1:] = [part[:width], ""]
                part = part[width:]
            lines[-1] += part
    return lines
