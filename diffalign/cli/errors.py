"""What a verb does with an error: one line for what a user can mend, a traceback for a bug."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from diffalign.errors import DiffalignError


@contextmanager
def plain_errors(goes_on: bool = False) -> Iterator[None]:
    """What a user can mend becomes one line and exit code 2, Ctrl-C one line and 130. Bugs keep their traceback."""
    try:
        yield
    except DiffalignError as error:
        raise _leave(f"error: {error}", 2) from None
    except KeyboardInterrupt:
        raise _leave(
            "stopped by Ctrl-C" + ("; the same command goes on where it stopped" if goes_on else ""), 130
        ) from None
    except Exception as error:
        complaint = _system_complaint(error)
        if complaint is None:
            raise
        raise _leave(f"error: {complaint}", 2) from None


def _leave(message: str, code: int) -> typer.Exit:
    print(message.replace("\n", " "), file=sys.stderr, flush=True)
    return typer.Exit(code)


def _system_complaint(error: BaseException | None) -> str | None:
    """What to say when the disk is full or a folder may not be written; None for every other error."""
    while error is not None:
        path = f" while writing {error.filename}" if isinstance(error, OSError) and error.filename else ""
        number = error.errno if isinstance(error, OSError) else None
        # safetensors and pyarrow report a full disk with errors of their own that carry only the system's words
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return f"no disk space left{path}; free some or write elsewhere, then run the same command again"
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"no permission{path.replace('writing', 'opening')}; change the folder or its rights"
        error = error.__cause__ or error.__context__
    return None
