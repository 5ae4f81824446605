"""Lines that libraries print: one line each, not too long, without control characters; only errors where that can be set."""

import io
import logging
import os
import re
import sys
import warnings

from diffalign.progress import visible
from diffalign.redaction import redact

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LONGEST = 1000
"""Characters of a library's line; diffusers, for one, prints a whole prompt where it cuts one."""
VERBOSITY = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")


class _PlainRecord(logging.LogRecord):
    """A record of any library's logger, whose message is one line that a terminal may show."""

    def getMessage(self) -> str:
        return _one_line(super().getMessage())


def guard_libraries() -> None:
    """Make what libraries log and warn about plain lines; call it before they are imported, once or more often.

    A character that the terminal's encoding lacks is printed as an escape.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    for name in VERBOSITY:
        os.environ.setdefault(name, "error")
    warnings.filterwarnings("ignore", message=r"Image size .* exceeds limit")  # files/images.py has its own
    logging.setLogRecordFactory(_PlainRecord)
    warnings.formatwarning = _formatted


def _formatted(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"{category.__name__}: {_one_line(str(message))}\n"


def _one_line(text: str) -> str:
    plain = visible(redact(" ".join(COLOUR.sub("", text).split())))
    return plain if len(plain) <= LONGEST else f"{plain[:LONGEST]}..."
