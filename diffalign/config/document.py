"""Reading YAML so that every key knows its line, and dotted overrides so that every value knows its argument.

Differences from plain PyYAML, each against a silent mistake: `1e-4` is a number (YAML 1.2), `no`, `on` and `yes` are
text, `010` is ten, dates are text, and a key that occurs twice is refused instead of winning silently.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diffalign.errors import DiffalignError
from diffalign.files.parse import MAX_DEPTH, MAX_YAML, ODD_VALUES, Yaml12Loader, compose_yaml
from diffalign.redaction import HIDDEN, holds_secret, is_secret, redact, redact_argument

LONGEST_SHOWN = 80
"""Characters of an argument in a message."""
Key = tuple[str | int, ...]
"""The way to a value: ("model", "path"), ("tune", "targets", 0)."""


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or the loader above would take for another type: a revision `12e4567` is text."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML declares it so
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *Yaml12Loader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *Yaml12Loader.yaml_implicit_resolvers}
    }


def dump(values: dict[str, Any], *, flow: bool = False) -> str:
    """Return YAML that `read_document` reads back to equal values; `flow`: in one line, as {a: 1}."""
    width = 10**6 if flow else 120
    style = True if flow else None
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width, default_flow_style=style or False
    )


@dataclass
class Document:
    """Plain values, and where each one stands."""

    values: dict[str, Any]
    source: str
    """How messages name the file, or "" where there is none."""
    places: dict[Key, str] = field(default_factory=dict)
    """Key -> "configs/x.yaml:12" or "argument 'train.steps=x'"."""
    text: str = ""
    """The file as it was read, for its comments."""

    def place(self, key: Key) -> str:
        """Return the place of the key, or of the nearest section around it, or the file."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.places:
                return self.places[key[:end]]
        return self.source


def read_document(path: Path) -> Document:
    """Read a config file. Raises DiffalignError: unreadable, not YAML, no mapping, a key twice."""
    source = str(path)
    try:
        if path.stat().st_size > 4 * MAX_YAML:
            raise DiffalignError(f"{source}: {path.stat().st_size} bytes, too large for a config")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DiffalignError(f"{source}: not a text file in UTF-8 (byte {error.start}); a config is YAML") from error
    except OSError as error:
        raise DiffalignError(f"{source}: cannot be read: {error.strerror or error}") from error
    node, loader = compose_yaml(text, source)
    document = Document({}, source, text=text)
    if node is None:
        return document
    if not isinstance(node, yaml.MappingNode):
        raise DiffalignError(
            f"{source}:{_line(node)}: a config is a mapping of sections, such as `model:`, not {_shape(node)}"
        )
    document.values = _plain(node, loader, (), document, source, by_line=True)
    return document


def apply_override(document: Document, argument: str, below: str | None = None) -> None:
    """Put `section.key=value` into the document. The value is YAML: 1e-4, [a, b], null, {name: sft}.

    An entry of a list is named by its index: `generators.0.batch_size=8`. below: a key under the named one, where the
    argument is short for it. Raises DiffalignError for an argument of another
    form, a key below a plain value, and an index that the list does not have.
    """
    place = _argument_place(argument)
    dotted, equals, _ = argument.partition("=")
    words = [*dotted.strip().split("."), *([] if below is None else [below])]
    if not equals or not all(words):
        raise DiffalignError(f"{place}: write key.sub=value, such as train.steps=400")
    if len(words) > MAX_DEPTH:
        raise DiffalignError(f"{place}: nested more than {MAX_DEPTH} levels deep")
    node, loader = _composed(argument)
    target: Any = document.values
    key: Key = ()
    for word in words[:-1]:
        step = _step(document, target, key, word, place)
        key = (*key, step)
        inner = target[step] if isinstance(step, int) else target.get(step)
        if inner is None:  # `section:` with nothing below it, or no such section yet
            inner = target[step] = {}
        target = inner
    last = _step(document, target, key, words[-1], place)
    key = (*key, last)
    for way in [way for way in document.places if way[: len(key)] == key]:
        del document.places[way]
    for depth in range(1, len(key) + 1):
        document.places.setdefault(key[:depth], place)
    target[last] = None if node is None else _plain(node, loader, key, document, place, by_line=False)


def _argument_place(argument: str) -> str:
    """Return how messages name an argument: in one line, not too long, without the token that it may hold."""
    shown = " ".join(redact_argument(argument).split())
    return f"argument '{shown if len(shown) <= LONGEST_SHOWN else shown[:LONGEST_SHOWN] + '...'}'"


def _composed(argument: str) -> tuple[yaml.Node | None, yaml.SafeLoader]:
    """Return the node and the loader of an argument's value, as `compose_yaml` does."""
    dotted, _, text = argument.partition("=")
    try:
        return compose_yaml(text, _argument_place(argument))
    except DiffalignError as error:
        if not holds_secret(dotted):
            raise
        raise DiffalignError(f"{_argument_place(argument)}: not valid YAML; put quotes around it") from error


def _step(document: Document, target: Any, key: Key, word: str, place: str) -> str | int:
    """Return `word` as a key of the section `target`, or as an index of the list `target`."""
    if isinstance(target, dict):
        return word
    if not isinstance(target, list):
        value = HIDDEN if any(map(is_secret, key)) else redact(repr(target))
        above = f"{_dotted(key)} is a value ({value}, {document.place(key)})"
        raise DiffalignError(f"{place}: {above}, not a section with keys")
    if not word.isdecimal() or int(word) >= len(target):
        entries = f"0 to {len(target) - 1}" if target else "it is empty"
        raise DiffalignError(
            f"{place}: {_dotted(key)} is a list ({document.place(key)}); name an entry by its index ({entries}), "
            f"or give the whole list as {_dotted(key)}=[...]"
        )
    return int(word)


def is_text(argument: str) -> bool:
    """Return whether the value of `key=value` is a plain text, not a number, a list, a section or null."""
    node, _ = _composed(argument)
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str"


def _plain(
    node: yaml.Node,
    loader: yaml.SafeLoader,
    key: Key,
    document: Document,
    source: str,
    *,
    by_line: bool,
) -> Any:
    """Return the node's value in Python, and note the place of everything in it."""
    here = f"{source}:{_line(node)}" if by_line else source
    document.places.setdefault(key, here)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, loader, (*key, i), document, source, by_line=by_line) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = f"{source}:{_line(key_node)}" if by_line else source
            if not isinstance(key_node, yaml.ScalarNode):
                raise DiffalignError(f"{place}: a key must be a word, not {_shape(key_node)}")
            name = key_node.value
            if name in values:
                raise DiffalignError(f"{place}: {_dotted((*key, name))} occurs twice in this section; delete one")
            document.places[(*key, name)] = place
            values[name] = _plain(value_node, loader, (*key, name), document, source, by_line=by_line)
        return values
    try:
        return loader.construct_object(node)
    except ODD_VALUES as error:
        reason = HIDDEN if any(map(is_secret, key)) else redact(" ".join(str(error).split()))
        raise DiffalignError(f"{here}: {_dotted(key)} cannot be read: {reason}") from error


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _shape(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "a mapping" if isinstance(node, yaml.MappingNode) else "a single value"


def _dotted(key: Key) -> str:
    return ".".join(map(str, key)) or "the config"
