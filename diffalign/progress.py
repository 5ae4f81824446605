"""Show how work proceeds: messages, and a plain line every few seconds while images are drawn or scored."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable

from diffalign.redaction import redact

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
    """Print a line and flush it, so that it appears at once in a file or a pipe too."""
    print(_line(message), flush=True)


def say_aside(message: str) -> None:
    """Print a line to standard error, apart from a command's results."""
    print(_line(message), file=sys.stderr, flush=True)


def say_block(text: str) -> None:
    """Print a text of several lines, such as a config or a table."""
    print(visible(redact(text), keep="\n\t"), flush=True)


class ImageProgress:
    """Prints `what: 64/256 images, 0.120 s each` at most every `every` seconds, and at the end.

    The first call for a name starts the clock: it gives the number of images that existed already, and prints nothing.
    A call with fewer images done than before starts the clock again.
    """

    def __init__(self, say: Say = say, every: float = 15.0) -> None:
        self.say, self.every = say, every
        self.what: str | None = None
        self.first = self.done = 0
        self.started = self.last = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self.what or done < self.done:
            self.what, self.first, self.started, self.last = what, done, now, now
        elif now - self.last >= self.every or done == total:
            self.last = now
            self.say(f"{what}: {done}/{total} images, {(now - self.started) / max(done - self.first, 1):.3f} s each")
        self.done = done

    def named(self, what: str) -> OnImages:
        """Return a callback for one kind of work: called with (images done, images in all)."""
        return lambda done, total: self(what, done, total)
