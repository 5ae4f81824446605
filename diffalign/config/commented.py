"""Printing a config with every key, its meaning and its default; the same code writes `docs/config.md`.

python -m diffalign.config.commented > docs/config.md
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from diffalign.config.any_kind import any_path, kind_of
from diffalign.config.document import Key, dump
from diffalign.config.load import KINDS, load
from diffalign.config.recipes import bases_of
from diffalign.config.run import StepSection
from diffalign.config.section import keys_of
from diffalign.files.parse import compose_yaml

WIDTH = 80
Notes = dict[Key, str]


def commented_recipe(name: str | Path, overrides: Sequence[str] = ()) -> str:
    """Return a recipe, a config file or a run's config as YAML that states every key, with meanings and the file's notes.

    `load` reads the text back to an equal config. Raises DiffalignError for a file that does not load.
    """
    path = any_path(name)
    kind = kind_of(path)
    header, notes = read_notes(path)
    for base in bases_of(path):
        above, below = read_notes(base)
        header, notes = [*header, *above], {**below, **notes}
    for argument in overrides:  # what a file says of its own value says nothing of this one
        given = tuple(argument.partition("=")[0].strip().split("."))
        notes = {way: note for way, note in notes.items() if tuple(map(str, way))[: len(given)] != given}
    config = load(kind, path, overrides)
    lines = [*(f"# {line}".rstrip() for line in header), *_section(config, notes, (), 0)]
    return "\n".join(lines).strip() + "\n"


def reference() -> str:
    """Return `docs/config.md`: every key of every verb."""
    parts = [
        "# Every key of every config",
        "Written by `make docs` from the schema; a test compares the two. A config states what differs from the defaults: "
        "see [the recipes](../configs). `diffalign recipes NAME` prints a recipe with every key. A list's entry is reached "
        "by its index: `generators.0.batch_size=8`. A text in a section's place is its main key: `reward=pickscore` is "
        "`reward.name=pickscore`.",
    ]
    for kind, model in KINDS.items():
        doc = (model.__doc__ or "").strip().splitlines()[0]
        parts += [f"## `diffalign {kind}`", doc, "```yaml\n" + "\n".join(_schema(model, 0)) + "\n```"]
    return "\n\n".join(parts) + "\n"


def read_notes(path: Path) -> tuple[list[str], Notes]:
    """Return the comments of a config file: those at its head, and the note beside or above each key."""
    text = path.read_text(encoding="utf-8-sig")
    lines = text.splitlines()
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        head.append(line[1:].strip())
    notes: Notes = {}
    node, _ = compose_yaml(text, str(path))
    if node is not None:
        _gather(node, (), lines, notes, len(head))
    return head, notes


def _gather(node: yaml.Node, key: Key, lines: list[str], notes: Notes, first: int) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _gather(item, (*key, index), lines, notes, first)
    if not isinstance(node, yaml.MappingNode):
        return
    for name, value in node.value:
        way = (*key, name.value)
        row, end = name.start_mark.line, name.end_mark
        block = isinstance(value, yaml.CollectionNode) and not value.flow_style
        if not block and value.end_mark.line == row:
            end = value.end_mark
        beside = lines[row][end.column :].partition("#")[2].strip()
        above: list[str] = []
        while row - 1 >= first and lines[row - 1].lstrip().startswith("#"):
            row -= 1
            above.insert(0, lines[row].strip()[1:].strip())
        if beside or above:
            notes[way] = " ".join([*above, beside]).strip()
        if block:
            _gather(value, way, lines, notes, first)


def _section(section: BaseModel, notes: Notes, key: Key, depth: int) -> Iterator[str]:
    """Yield the lines of a section with its values."""
    pad = "  " * depth
    for name in keys_of(type(section)):
        field, value, way = type(section).model_fields[name], getattr(section, name), (*key, name)
        if name == "token":  # never written out
            value = None
        note = f" # {notes[way]}" if way in notes else ""
        if depth == 0:
            yield ""
        if isinstance(value, BaseModel):
            yield f"{pad}{name}: # {_title(value)}{'; ' + notes[way] if way in notes else ''}"
            yield from _section(value, notes, way, depth + 1)
            continue
        yield from _comment(_meaning(field, type(section), name), pad)
        if isinstance(value, list) and value and all(isinstance(entry, BaseModel) for entry in value):
            yield f"{pad}{name}:{note}"
            for index, entry in enumerate(value):
                yield from _entry(_section(entry, notes, (*way, index), depth + 2), pad + "  ", comments=index == 0)
        else:
            yield f"{pad}{name}: {_flow(section.model_dump(mode='json')[name] if name != 'token' else None)}{note}"


def _entry(lines: Iterator[str], pad: str, *, comments: bool) -> Iterator[str]:
    """Yield a list's entry: its first key gets the dash; the meanings stand in the first entry alone."""
    begun = False
    for line in lines:
        if line.lstrip().startswith("#"):
            if comments:
                yield line if begun else line[2:]
        elif begun:
            yield line
        else:
            begun = True
            yield f"{pad}- {line.lstrip()}"


def _schema(model: type[BaseModel], depth: int) -> Iterator[str]:
    """Yield the lines of a section's keys with their defaults; a required key stands without a value."""
    pad = "  " * depth
    for name in keys_of(model):
        field = model.model_fields[name]
        sections = [one for one in _models(field.annotation) if one is not model]
        if not sections:
            yield from _comment(_meaning(field, model, name), pad)
            default = _default(field)
            yield f"{pad}{name}:{'' if default is PydanticUndefined else ' ' + _flow(_plain(default))}"
            continue
        if field.description:
            yield from _comment(_meaning(field, model, name), pad)
        listed = "list[" in str(field.annotation)
        for number, one in enumerate(sections):
            kind = "or: " if number else "a list of: " if listed else ""
            yield f"{pad}{name}: # {kind}{_title(one)}"
            yield from _schema(one, depth + 1)


def _title(section: BaseModel | type[BaseModel]) -> str:
    kind = section if isinstance(section, type) else type(section)
    return " ".join((kind.__doc__ or "").strip().split("\n\n")[0].split())


def _meaning(field: FieldInfo, model: type[BaseModel], name: str) -> str:
    """Return allowed values, meaning and default in one text."""
    words = _words(field.annotation)
    allowed = words if len(words) > 1 else []  # one word is no choice
    default = _default(field)
    text = field.description or ""
    # A word that is a value keeps its case: "true: less memory".
    parts = [" | ".join(allowed), text if re.match(r"[\w-]+:", text) else text[:1].upper() + text[1:]]
    if default is PydanticUndefined:
        parts.append("Required")
    elif issubclass(model, StepSection) and name == "micro_batch":
        pass  # derived; the meaning says how
    elif default in (None, []) or (len(words) != 1 and not list(_models(field.annotation))):
        parts.append(f"Default: {_flow(_plain(default))}")
    return ". ".join(part.rstrip(".") for part in parts if part)


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def _words(annotation: Any) -> list[str]:
    """Return the words of a Literal, also inside Optional."""
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation)]
    if get_origin(annotation) in (Annotated, Union, UnionType):
        return [word for inner in get_args(annotation) for word in _words(inner)]
    return []


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, UnionType, list):
        for inner in get_args(annotation):
            yield from _models(inner)


def _flow(value: Any) -> str:
    """Return a value as YAML in one line, such as `[a, b]`, `1.0e-05` or `null`."""
    text = dump({"v": value}, flow=True).strip()
    return text.removeprefix("{v: ").removesuffix("}")


def _comment(text: str, pad: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# ")


if __name__ == "__main__":
    print(reference(), end="")
