"""Recipes: which are shipped, what each is for, and how one file builds on another.

A recipe states what differs from the defaults, and why. `extends: NAME` takes every other value from a base: a recipe, or a
file beside this one. One level only, so that a value is found in one of two files; but a file of yours may extend any
recipe, also one that has a base.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from diffalign.config.document import Document, Key, read_document
from diffalign.config.texts import write_out_texts
from diffalign.errors import DiffalignError

EXTENDS = "extends"
ABOUT = "about"
ABOUT_KEYS = ("task", "model", "memory")


@dataclass(frozen=True)
class Recipe:
    """A shipped recipe: one line of `diffalign recipes`."""

    name: str
    path: Path
    task: str
    model: str
    memory: str


def _folder() -> Path:
    return Path(str(resources.files("diffalign.configs")))


def recipes() -> dict[str, Path]:
    """Return the shipped recipes: name -> file."""
    return {path.stem: path for path in sorted(_folder().glob("*.yaml"))}


def list_recipes() -> list[Recipe]:
    """Return what each shipped recipe trains or makes, on which model, on how large a machine."""
    return [Recipe(name, path, **_about(read_document(path))) for name, path in recipes().items()]


def config_path(name: str | Path) -> Path:
    """Return the file that CONFIG means: a file of that name, else a shipped recipe. Raises DiffalignError for neither."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = recipes()
    if str(name) in shipped:
        return shipped[str(name)]
    if path.is_dir():
        raise DiffalignError(f"{name}: a folder, where a config file or the name of a recipe is expected")
    if len(path.parts) > 1 and not path.suffix:
        raise DiffalignError(f"{name}: no such file or folder; `diffalign recipes` lists the recipes")
    hint = _meant(path.stem.lower(), list(shipped))
    raise DiffalignError(f"{name}: neither a file nor a shipped recipe; {hint}")


def _meant(name: str, shipped: list[str]) -> str:
    """Return which recipes a name may mean: those of the method in it, else the closest one."""
    if "gdnm" in name:  # a slip of GNDM
        name = name.replace("gdnm", "gndm")
        found = [one for one in shipped if one == name] or [one for one in shipped if "gndm" in one]
        return f"did you mean {' or '.join(found)}?"
    near = difflib.get_close_matches(name, shipped, n=1)
    return f"did you mean {near[0]}?" if near else "`diffalign recipes` lists the recipes"


def read_recipe(path: Path, model: type[BaseModel]) -> Document:
    """Read a config file of this class together with what it extends; values keep the place where they stand.

    Raises DiffalignError, with file and line, for a base that does not exist, and for a base of one's own that extends
    another file itself.
    """
    document = read_document(path)
    _about(document)
    base = document.values.pop(EXTENDS, None)
    document.values.pop(ABOUT, None)
    write_out_texts(document, model)
    if base is None:
        return document
    place = document.place((EXTENDS,))
    below_path = _base_path(base, path, place)
    below = read_document(below_path)
    if EXTENDS in below.values and below_path in recipes().values() and path not in recipes().values():
        below = read_recipe(below_path, model)
    elif EXTENDS in below.values:
        raise DiffalignError(
            f"{place}: extends {base}, which extends {below.values[EXTENDS]} itself; one level only (recipes aside), so "
            "extend that and state the rest here"
        )
    below.values.pop(ABOUT, None)
    write_out_texts(below, model)
    values = _merged(below.values, document.values, (), below.places)
    return Document(values, document.source, {**below.places, **document.places}, document.text)


def base_of(path: Path) -> Path | None:
    """Return the file that `path` extends; None where it stands alone."""
    document = read_document(path)
    base = document.values.get(EXTENDS)
    return None if base is None else _base_path(base, path, document.place((EXTENDS,)))


def bases_of(path: Path) -> list[Path]:
    """Return the files that `path` extends: its base, then the base of that."""
    base = base_of(path)
    return [] if base is None else [base, *bases_of(base)]


def _base_path(base: object, path: Path, place: str) -> Path:
    if not isinstance(base, str) or not base:
        raise DiffalignError(f"{place}: extends takes the name of a recipe or of a file beside this one, not {base!r}")
    beside = path.parent / base
    for found in (beside, beside.with_name(f"{beside.name}.yaml"), _folder() / f"{base}.yaml"):
        if found.is_file():
            if found.resolve() == path.resolve():
                raise DiffalignError(f"{place}: the file extends itself; name another one")
            return found
    near = difflib.get_close_matches(base, recipes(), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise DiffalignError(f"{place}: extends {base}, which is neither a file beside this one nor a recipe{hint}")


def _merged(below: Any, above: Any, key: Key, places: dict[Key, str]) -> Any:
    """Return `above` on top of `below`: sections are merged, all else is replaced, and its places are forgotten."""
    if isinstance(below, dict) and isinstance(above, dict):
        if (
            "name" in below
            and above.get("name", below["name"]) != below["name"]
            and key in (("objective",), ("method",))
        ):
            # Another objective: the keys of the base's mean nothing to it.
            _forget(places, key)
            return above
        merged = dict(below)
        for name, value in above.items():
            merged[name] = _merged(below[name], value, (*key, name), places) if name in below else value
        return merged
    if above is None and isinstance(below, dict):  # `section:` with every key below it commented out
        return below
    _forget(places, key)
    return above


def _forget(places: dict[Key, str], key: Key) -> None:
    for way in [way for way in places if way[: len(key)] == key]:
        del places[way]


def _about(document: Document) -> dict[str, str]:
    """Return the recipe's line for the list: task, model and memory, each a short text; a user's file may leave it out."""
    about = document.values.get(ABOUT)
    if about is None:
        return dict.fromkeys(ABOUT_KEYS, "")
    if (
        not isinstance(about, dict)
        or set(about) != set(ABOUT_KEYS)
        or not all(isinstance(v, str) for v in about.values())
    ):
        raise DiffalignError(
            f"{document.place((ABOUT,))}: about takes three texts, as {{task: Diffusion-DPO, model: SDXL, memory: 24 GB}}"
        )
    return about
