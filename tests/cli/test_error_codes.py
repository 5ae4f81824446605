"""The codes of errors: each is explained once, each place has one, and the command line shows it."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from diffalign import config
from diffalign.error_codes import CODES, PLACES, code_of_module
from diffalign.errors import DiffalignError
from diffalign.files.images import decode
from diffalign.packages import not_installed
from helpers.command_line import refused

ROOT = Path(__file__).resolve().parents[2]
HEADING = re.compile(r"^### (DA\d{3}): (.+)$", re.MULTILINE)


def modules() -> list[tuple[str, Path]]:
    """The name and file of every module of the package."""
    found = []
    for below in ("", "rewards", "pipelines"):
        package = importlib.import_module(".".join(filter(None, ("diffalign", below))))
        folder = Path(next(iter(package.__path__)))
        for path in folder.rglob("*.py"):
            parts = [*package.__name__.split("."), *path.relative_to(folder).with_suffix("").parts]
            found.append((".".join(parts).removesuffix(".__init__"), path))
    return list(dict.fromkeys(found))


def raises(path: Path) -> bool:
    """Whether a module raises an error that is meant for users."""
    thrown = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Raise) and n.exc]
    return any("DiffalignError" in ast.unparse(one.exc) for one in thrown if one.exc is not None)


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the page is not in the wheel")
def test_the_page_explains_every_code_once_and_no_other() -> None:
    explained = HEADING.findall((ROOT / "docs" / "errors.md").read_text(encoding="utf-8"))
    assert explained == list(CODES.items())


def test_every_module_that_raises_has_a_code_of_its_own() -> None:
    raising = [name for name, path in modules() if raises(path)]
    assert len(raising) > 100
    assert not [name for name in raising if code_of_module(name) == "DA100"]


def test_the_table_names_codes_and_places_that_exist() -> None:
    names = {name.removeprefix("diffalign.") for name, _ in modules()}
    assert not [place for place in PLACES if place not in names]
    classes = {"DA100", "DA201", "DA205"}  # of others, of one class, of the system's errors
    assert set(PLACES.values()) | classes == set(CODES)


def test_the_code_follows_from_where_an_error_was_raised() -> None:
    with pytest.raises(DiffalignError) as unknown_key:
        config.load("train", "sdxl_dpo", ["train.stepz=7"])
    with pytest.raises(DiffalignError) as unknown_recipe:
        config.load("train", "sdxl_dqo", [])
    with pytest.raises(DiffalignError) as no_image:
        decode(b"no image")
    assert [unknown_key.value.code, unknown_recipe.value.code, no_image.value.code] == ["DA102", "DA103", "DA305"]
    assert not_installed("ray").code == "DA201" and DiffalignError("of another package").code == "DA100"


def test_the_command_line_ends_with_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "score", "nowhere", "-r", "sharpnes").endswith("did you mean 'sharpness'? [DA202]\n")
    assert refused(capsys, "train", "sdxl_dpo", "train.stepz=7").endswith("[DA102]\n")
