"""Texts in the place of sections: `reward: pickscore` is `reward: {name: pickscore}`, in files and in arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_origin

from pydantic import BaseModel

from diffalign.config.document import Document, Key
from diffalign.config.explain import models_of
from diffalign.config.section import Section


def text_key(kind: type[BaseModel], key: Sequence[str | int]) -> str | None:
    """Return the key for which a text in a section's place is short: `name` for ("reward",); None where no section is."""
    inside: list[type[BaseModel]] = [kind]
    listed = False
    for part in map(str, key):
        if part.isdecimal() and listed:
            listed = False
            continue
        found = next((model.model_fields[part] for model in inside if part in model.model_fields), None)
        if found is None or listed:
            return None
        listed, inside = get_origin(found.annotation) is list, list(models_of(found.annotation))
    first = inside[0] if inside and not listed else None
    return first.text_key if first is not None and issubclass(first, Section) else None


def write_out_texts(document: Document, model: type[BaseModel]) -> None:
    """Turn texts of a file in the place of sections into those sections, so that arguments can change their keys."""
    _write_out(document, model, document.values, ())


def _write_out(document: Document, model: type[BaseModel], inside: object, key: Key) -> None:
    """Do so in the values `inside`, which stand at `key`."""
    if not isinstance(inside, dict | list):
        return
    for name, value in list(inside.items() if isinstance(inside, dict) else enumerate(inside)):
        here = (*key, name)
        if isinstance(value, str) and (below := text_key(model, here)) is not None:
            inside[name] = {below: value}
            document.places[(*here, below)] = document.place(here)
        else:
            _write_out(document, model, value, here)
