"""Turn errors that a user can mend into one line and an exit code; bugs keep their traceback."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import typer

from diffalign import stopping
from diffalign.error_codes import NO_ROOM
from diffalign.errors import DiffalignError
from diffalign.packages import extras_named
from diffalign.progress import say_aside

NOT_THERE = (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY, errno.ENXIO)
"""Errors of the system about a path that the user gave: no file of that name can be there."""


@contextmanager
def plain_errors(resumes: bool = False) -> Iterator[None]:
    """End the command with one line and an exit code (`diffalign.cli` lists them). Bugs keep their traceback.

    The line of a mistake ends with its code, such as [DA102]; docs/errors.md explains the codes.

    resumes: whether the same command resumes where it was stopped; then signals are handled (`diffalign.stopping`).
    """
    try:
        with stopping.stopping_on_signals() if resumes else nullcontext(), extras_named():
            yield
    except DiffalignError as error:
        raise _exit(f"error: {error} [{error.code}]", 2) from None
    except stopping.Stopped as stopped:
        raise _exit(str(stopped), stopping.RESUME_CODE) from None
    except typer.Abort:  # Ctrl-C or Ctrl-D at a question, whose line has not ended
        say_aside("")
        raise _exit("stopped at a question; nothing was written", 130) from None
    except KeyboardInterrupt:
        advice = f": {stopping.what_is_kept()}" if resumes else ""
        raise _exit(f"stopped by Ctrl-C{advice}", 130) from None
    except Exception as error:
        complaint = _system_complaint(error)
        if complaint is None:
            if isinstance(error, EOFError):  # typer takes it for Ctrl-D: it would say "Aborted!" and hide the traceback
                raise RuntimeError("a file ended too early") from error
            raise
        raise _exit(f"error: {complaint} [{NO_ROOM}]", 2) from None


def _exit(message: str, code: int) -> typer.Exit:
    """Print a message as one line and return the exception that ends the command with `code`."""
    say_aside(" ".join(filter(None, message.splitlines())))
    return typer.Exit(code)


def _system_complaint(error: BaseException | None) -> str | None:
    """Return what to print when the disk is full or a folder may not be written; None for every other error."""
    while error is not None:
        path = f" while writing {error.filename}" if isinstance(error, OSError) and error.filename else ""
        number = error.errno if isinstance(error, OSError) else None
        # safetensors and pyarrow report a full disk with errors of their own that carry only the system's words
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return f"no disk space left{path}; free some or write elsewhere, then run the same command again"
        if number in NOT_THERE and isinstance(error, OSError) and error.filename:
            return f"{error.filename}: {error.strerror}; choose another place"
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"no permission{path.replace('writing', 'opening')}; change the folder or its rights"
        error = error.__cause__ or error.__context__
    return None
