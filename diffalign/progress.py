"""Tell a person how work proceeds: messages, and a plain line every few seconds while images are drawn or scored."""

import sys
import time
from collections.abc import Callable

Say = Callable[[str], None]
"""Shows one line to the user."""

OnImages = Callable[[int, int], None]
"""Called with (images done, images in all)."""


def say(message: str) -> None:
    """Print a line at once, though the output may be a file or a pipe."""
    print(message, flush=True)


def say_aside(message: str) -> None:
    """Print a line to the error stream, where it does not mix with a command's results."""
    print(message, file=sys.stderr, flush=True)


class ImageProgress:
    """Prints `what: 64/256 images, 0.120 s each` at most every `every` seconds, and at the end.

    The first call for a name is the start: it says how many images were there already, and prints nothing. So does a call
    with fewer images done than before.
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
        """Return a callback for work that has one name: called with (done, total)."""
        return lambda done, total: self(what, done, total)
