"""Errors for the user: one line, and not a word of the libraries beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from diffalign.errors import DiffalignError


def refused(action: Callable[[], object], capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line that the action is refused with, which has the words; nothing else may be written."""
    capfd.readouterr()
    with pytest.raises(DiffalignError) as error:
        action()
    written = capfd.readouterr()
    assert written.out + written.err == "" and "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value
    return str(error.value)
