"""Call the command line in this process."""

from __future__ import annotations

import pytest

from diffalign.cli import app


def run(*arguments: object) -> int:
    """Run `diffalign` with these arguments and return its exit code."""
    with pytest.raises(SystemExit) as left:
        app([str(a) for a in arguments], prog_name="diffalign")
    return int(left.value.code or 0)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line on stderr of a call that a user's mistake ends."""
    capsys.readouterr()
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error
