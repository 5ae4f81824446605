"""Show how work proceeds: messages, and a bar, or a plain line every few seconds, while a model is loaded or images are
encoded, drawn or scored.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from diffalign.redaction import redact

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Say = Callable[[str], None]
"""A function that shows one line to the user."""

OnImages = Callable[[int, int], None]
"""A callback: (images done, images in all)."""


OnNamedImages = Callable[[str, int, int], None]
"""A callback: (name of the work, images done, images in all); `ImageProgress` is one."""


# Control characters, marks that turn the direction of text or cannot be seen, and lone surrogates. The joiners of emoji
# and scripts stay.
HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)


LEAD = re.compile(r"(#? *)")
LONGEST_LINE = 10_000
"""Characters of a line on the terminal: a message may name a prompt, and a prompt may have a million."""


def visible(text: str, keep: str = "") -> str:
    """Return text from anywhere as a terminal may show it: what would move the cursor, ring or hide becomes an escape.

    keep: characters that stay as they are, such as the newlines of a block.
    """
    return HIDDEN.sub(lambda found: found.group() if found.group() in keep else _escape(found.group()), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _line(message: str) -> str:
    shown = visible(redact(message))
    return shown if len(shown) <= LONGEST_LINE else f"{shown[:LONGEST_LINE]}..."


def say(message: str) -> None:
    """Print a line and flush it, so that it appears at once in a file or a pipe too. A terminal breaks it between words."""
    print(_fitted(_line(message), sys.stdout), flush=True)


def say_aside(message: str) -> None:
    """Print a line to standard error, apart from a command's results; a terminal breaks it between words."""
    print(_fitted(_line(message), sys.stderr), file=sys.stderr, flush=True)


def _fitted(line: str, stream: TextIO) -> str:
    """Return a line as it is for a file; for a terminal broken between words, further lines indented as the first."""
    if not stream.isatty():
        return line
    width = shutil.get_terminal_size().columns
    indent = LEAD.match(line)
    lead = indent.group() if indent else ""
    # Words stay whole, since a path or a command is copied; a line that is nothing but one is left to the terminal.
    return "\n".join(
        textwrap.wrap(
            line,
            max(width, 20),
            subsequent_indent=lead + ("  " if lead else ""),
            break_long_words=False,
            break_on_hyphens=False,
            replace_whitespace=False,
            drop_whitespace=True,
        )
        or [line]
    )


def say_block(text: str) -> None:
    """Print a text of several lines, such as a config or a table."""
    print(visible(redact(text), keep="\n\t"), flush=True)


def progress_bar(console: Console, what: str, done: int, total: int, transient: bool = False) -> Progress:
    """Return a bar with one task: what is done, the count, the time left, the bar, and the task's `text`.

    Where a terminal is narrow, the text is cut; the count and the time left stay whole.
    """
    # rich takes a while to import, and messages come from commands that never show a bar.
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    bar = Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=24)),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        BarColumn(max(8, min(24, console.width // 6))),
        TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
        console=console,
        transient=transient,
        expand=True,
    )
    bar.add_task(visible(what), total=total, completed=done, text="")
    return bar


def first_process() -> bool:
    """Return whether this is the only process of a launcher or its first: the others would draw over its bar."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def waiting_for(what: str, say: Say = say_aside, worth: float = 5.0) -> Iterator[None]:
    """Show on a terminal that something is loaded, with the seconds so far; elsewhere a line if it took `worth` seconds."""
    begun = time.monotonic()
    spinner: Progress | None = None
    if sys.stderr.isatty() and first_process():
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        spinner = Progress(*columns, console=Console(stderr=True), transient=True)
        spinner.add_task(visible(what), total=None)
        spinner.start()
    try:
        yield
    finally:
        if spinner is not None:
            spinner.stop()
    seconds = time.monotonic() - begun
    if spinner is None and seconds >= worth:
        say(f"{what}: {seconds:.0f} s")


class ImageProgress:
    """Shows a bar on a terminal, else prints `what: 64/256 images, 0.120 s each` at most every `every` seconds.

    The line is printed at the end in both cases, unless `closing` is False. The first call for a name starts the clock: it
    gives the number of images that existed already, and prints nothing. A call with fewer images done than before starts
    the clock again.

    unit: what is counted.
    """

    def __init__(
        self,
        say: Say = say,
        every: float = 15.0,
        console: Console | None = None,
        unit: str = "images",
        closing: bool = True,
    ) -> None:
        self.say, self.every, self.unit, self.closing = say, every, unit, closing
        self.what: str | None = None
        self.first = self.done = 0
        self.started = self.last = 0.0
        self._console = console
        self._bar: Progress | None = None
        self._stop: Callable[[], object] = lambda: None

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self.what or done < self.done:
            self.what, self.first, self.started, self.last = what, done, now, now
            self._start_bar(what, done, total)
        else:
            each = f"{(now - self.started) / max(done - self.first, 1):.3f} s each"
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=done, text=each)
            if done == total:
                self._stop_bar()
            if (done == total and self.closing) or (self._bar is None and now - self.last >= self.every):
                self.last = now
                self.say(f"{what}: {done}/{total} {self.unit}, {each}")
        self.done = done

    def _start_bar(self, what: str, done: int, total: int) -> None:
        """Start a bar if there is something to do and standard error is a terminal."""
        from rich.console import Console

        self._stop_bar()
        console = self._console or Console(stderr=True)
        if done < total and console.is_terminal and first_process():
            self._bar = progress_bar(console, what, done, total, transient=True)
            self._bar.start()
            # A run that ends by an error must give the terminal its cursor back.
            self._stop = weakref.finalize(self, self._bar.stop)

    def _stop_bar(self) -> None:
        self._stop()
        self._bar = None

    def named(self, what: str) -> OnImages:
        """Return a callback for one kind of work: called with (images done, images in all)."""
        return lambda done, total: self(what, done, total)
