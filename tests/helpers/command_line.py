"""Call the command line in this process."""

from __future__ import annotations

import pytest

from diffalign.cli import app


def run(*arguments: object) -> int:
    """Run `diffalign` with these arguments and return its exit code."""
    with pytest.raises(SystemExit) as left:
        app([str(a) for a in arguments], prog_name="diffalign")
    return int(left.value.code or 0)
