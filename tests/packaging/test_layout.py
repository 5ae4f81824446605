"""How the tests are laid out: in folders by subject, shared code in helpers, and no test file that needs another."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
FILES = sorted(TESTS.rglob("*.py"))
# Also inside of strings: some tests hand a program to another process.
IMPORT_OF_A_TEST_FILE = re.compile(r"^\s*(from|import) .*\btest_", re.MULTILINE)


def test_every_file_lies_in_a_folder() -> None:
    assert [p.name for p in FILES if p.parent == TESTS] == ["conftest.py"]


def test_helpers_is_the_only_package() -> None:
    """tests/ is on the path: a package named like one that is installed (`packaging`, say) would hide it."""
    assert [p.parent.name for p in FILES if p.name == "__init__.py"] == ["helpers"]


def test_helpers_hold_no_tests() -> None:
    assert not [p.name for p in (TESTS / "helpers").iterdir() if p.name.startswith("test_")]


def test_no_file_imports_a_test_file() -> None:
    assert not [p for p in FILES if IMPORT_OF_A_TEST_FILE.search(p.read_text(encoding="utf-8"))]
