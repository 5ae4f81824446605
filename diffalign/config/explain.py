"""From pydantic's errors to one line that a person can act on: place, key, what is wrong, what was perhaps meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from diffalign.config.document import Document, Key
from diffalign.config.objective import FOREIGN_SECTIONS
from diffalign.config.section import COMBINATION, MISSING, keys_of
from diffalign.config.synonyms import VALUES, elsewhere, other_verb
from diffalign.redaction import HIDDEN, is_secret, redact, redacted


def explain(error: ValidationError, document: Document, kind: type[BaseModel]) -> str:
    """Return one line for the first error, and the keys of the others. Unknown keys go first: they explain missing ones."""
    details = [one for one in error.errors(include_url=False) if one["type"] != "default_factory_not_called"]
    details.sort(key=lambda one: one["type"] != "extra_forbidden")
    lines = [_line(one, document, kind) for one in details]
    if len(lines) == 1:
        return lines[0]
    others = dict.fromkeys(_dotted(_way(one["loc"], kind)[0]) for one in details[1:])
    return f"{lines[0]} (also wrong: {', '.join(others)})"


def _line(one: ErrorDetails, document: Document, kind: type[BaseModel]) -> str:
    key, owner = _way(one["loc"], kind)
    context = one.get("ctx", {})
    if one["type"] == COMBINATION:
        # A check names keys relative to its own section, which stands at the error's location.
        keys: list[Key] = [(*key, *dotted.split(".")) for dotted in context["keys"]]
        written = [k for k in keys if k in document.places]  # blame what was written, not a default
        key = (written or keys)[0]
        said = context["message"]
        message = f"{_dotted(key)}{' ' if said.startswith(MISSING) else ': '}{said}"
    elif one["type"] == "value_error":
        message = f"{_dotted(key)}: {context['error']}"
    elif one["type"] in ("union_tag_not_found", "union_tag_invalid"):
        key, message = (*key, "name"), _objective(one, key, owner)
    elif one["type"] == "extra_forbidden":
        known = keys_of(owner) if owner else []
        hint = elsewhere(kind, key) or _meant(str(key[-1]), known, "keys here")
        message = f"unknown key {_dotted(key)}{hint}"
    elif one["type"] == "missing" and isinstance(key[-1], int):
        message = f"{_dotted(key[:-1])} has too few entries"
    elif one["type"] == "missing":
        found = owner.model_fields.get(str(key[-1])) if owner else None
        meaning = f" ({found.description})" if found and found.description else ""
        message = f"{_dotted(key)} {MISSING}; give {_dotted(key)}=... or write it into the file{meaning}"
    else:
        shown = HIDDEN if any(map(is_secret, key)) else f"{_shown(one['input'])}{_hint(one)}"
        message = f"{_dotted(key)} {_wanted(one)}, not {shown}"
    return f"{document.place(key)}: {message}"


def _objective(one: ErrorDetails, key: Key, owner: type[BaseModel] | None) -> str:
    """Explain an objective whose name is missing or unknown."""
    annotation = owner.model_fields[str(key[-1])].annotation if owner else None
    known = [tag for tag in map(_tag, models_of(annotation)) if tag]
    if one["type"] == "union_tag_not_found":
        return f"{_dotted(key)}.name is missing; one of {', '.join(known)}"
    name = str(one["ctx"]["tag"])
    return f"unknown {_dotted(key)} {name}{other_verb(name) or _meant(name, known, 'known')}"


def _hint(one: ErrorDetails) -> str:
    """Return the likely remedy for a wrong type or value, or ""."""
    given = redacted(one["input"])
    if one["type"] == "literal_error":
        known = re.findall(r"'([^']+)'", one["ctx"]["expected"])
        meant = VALUES.get(str(given))
        return f"; did you mean {meant}?" if meant in known else _meant(str(given), known, None)
    if one["type"] == "string_type" and isinstance(given, int | float):
        return "; quote it"
    if one["type"] == "list_type" and isinstance(given, str):
        return f"; write [{given}]"
    if one["type"].startswith(("float", "int", "bool")) and isinstance(given, str) and _looks_like_number(given):
        return "; without quotes"
    return ""


def _wanted(one: ErrorDetails) -> str:
    """Return "should be ..." for a wrong type or value."""
    if one["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "should be a section with keys"
    if one["type"] == "string_pattern_mismatch" and one["loc"] == ("labels", "source"):
        return "should be preference, scores.NAME or scores.NAME.COLUMN"
    return re.sub("^(Input|String|List|Tuple) should", "should", one["msg"])


def _way(loc: tuple[str | int, ...], kind: type[BaseModel]) -> tuple[Key, type[BaseModel] | None]:
    """Return pydantic's location without its tags for unions, and the section that owns the last key."""
    key: list[str | int] = []
    owner: type[BaseModel] | None = kind
    inside: list[type[BaseModel]] = [kind]
    for part in loc:
        tagged = [model for model in (*inside, *FOREIGN_SECTIONS.values()) if len(inside) > 1 and _tag(model) == part]
        if tagged:
            inside = tagged
            continue
        key.append(part)
        if isinstance(part, int):  # an entry of a list of sections: what follows belongs to its section
            continue
        owner = inside[0] if inside else None
        found = owner.model_fields.get(str(part)) if owner else None
        inside = list(models_of(found.annotation)) if found else []
    return tuple(key), owner


def models_of(annotation: object) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, UnionType, list):
        for inner in get_args(annotation):
            yield from models_of(inner)


def _tag(model: type[BaseModel]) -> str | None:
    """Return the value of `name` that chooses this model among the objectives."""
    return str(model.model_fields["name"].default) if "name" in model.model_fields else None


def _meant(given: str, known: list[str], otherwise: str | None) -> str:
    near = difflib.get_close_matches(given, known, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; {otherwise}: {', '.join(known)}" if otherwise and known else ""


def _dotted(key: Key) -> str:
    return ".".join(map(str, key))


def _shown(value: Any) -> str:
    text = redact(repr(redacted(value)))
    return text if len(text) <= 60 else text[:57] + "..."


def _looks_like_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
