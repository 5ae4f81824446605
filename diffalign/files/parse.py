"""Parse JSON and YAML from anywhere, with bounds: deep nesting, huge numbers and aliases cost one error, not the process."""

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from diffalign.errors import DiffalignError

MAX_DEPTH = 100
"""Levels of lists and objects in each other."""
MAX_VALUES = 100_000
"""Values of a YAML file after its aliases are expanded."""
MAX_YAML = 2_000_000
"""Characters of a YAML file; PyYAML reads about one million a second."""
LONGEST_INTEGER = 300
"""Digits of an integer; above, it has no float."""
ODD_VALUES = (yaml.YAMLError, ValueError, AttributeError, LookupError, TypeError, ArithmeticError)
"""What PyYAML's constructors raise on a scalar that does not fit its tag."""


class TooDeep(ValueError):
    """JSON that is nested more than `MAX_DEPTH` levels deep."""

    def __init__(self) -> None:
        super().__init__(f"nested more than {MAX_DEPTH} levels deep")


def parse_json(text: str | bytes) -> Any:
    """Return the value of JSON. An integer too long for a float is infinite, as 1e999 is; a lone surrogate is escaped.

    Raises ValueError with the reason: no JSON, no text, or nested more than `MAX_DEPTH` levels deep.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))
    try:
        value = json.loads(text, parse_int=_integer)
        if text.count("[") + text.count("{") > MAX_DEPTH and any(depth > MAX_DEPTH for depth in _depths(value)):
            raise TooDeep
    except RecursionError:
        raise TooDeep from None
    # Text in UTF-8 holds no lone surrogate, but an escape can be one.
    return _valid(value) if "\\ud" in text.lower() else value


def json_entries(text: str) -> Iterator[str]:
    """Yield the entries of a JSON list as texts, so that one that cannot be parsed costs only itself."""
    depth, start = 0, text.index("[") + 1
    for found in re.finditer(r'"(?:[^"\\]|\\.)*"|[][{},]', text):
        mark = found.group()
        if depth == 1 and mark in (",", "]"):
            if entry := text[start : found.start()].strip():
                yield entry
            start = found.end()
        depth += (mark in ("[", "{")) - (mark in ("]", "}"))


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= LONGEST_INTEGER else float(digits)


def _depths(value: object) -> Iterator[int]:
    """Yield the depth of every list and object, without recursion."""
    level = [value]
    depth = 0
    while level:
        depth += 1
        containers = [one for one in level if isinstance(one, list | dict)]
        if containers:
            yield depth
        level = [inner for one in containers for inner in (one.values() if isinstance(one, dict) else one)]


def _valid(value: object) -> object:
    """Return JSON with valid Unicode in its texts."""
    if isinstance(value, str):
        return value if value.isascii() else valid_unicode(value)
    if isinstance(value, list):
        return [_valid(one) for one in value]
    return {_valid(k): _valid(v) for k, v in value.items()} if isinstance(value, dict) else value


def valid_unicode(text: str) -> str:
    """Return text that UTF-8 can hold: lone surrogates, as in JSON and in file names, become escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class Yaml12Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: of PyYAML's implicit types only null survives, and the others are defined below."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  # PyYAML declares it so


Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
Yaml12Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


def _yaml_integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


Yaml12Loader.add_constructor("tag:yaml.org,2002:int", _yaml_integer)


def compose_yaml(text: str, source: str) -> tuple[yaml.Node | None, yaml.SafeLoader]:
    """Return the YAML text's root node and its loader; every walk over the nodes is short.

    Raises DiffalignError, naming `source` and the line: not YAML, nested too deeply, or too many values, aliases expanded.
    """
    if len(text) > MAX_YAML:
        raise DiffalignError(f"{source}: {len(text)} characters, more than {MAX_YAML} that are read of a YAML file")
    try:
        loader = Yaml12Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _check_values(node, source)
    except RecursionError:
        raise DiffalignError(f"{source}: not valid YAML: nested more than {MAX_DEPTH} levels deep") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = source if mark is None else place_in(source, mark.line)
        problem = str(error.problem or error.context)
        if isinstance(error, yaml.composer.ComposerError):  # its words hold the text, which may be a token
            problem = problem.partition("'")[0].strip()
        raise DiffalignError(f"{where}: not valid YAML: {problem}") from error
    except yaml.YAMLError as error:  # a control character: it has no mark
        raise DiffalignError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from error
    return node, loader


def parse_yaml(text: str, source: str) -> Any:
    """Return the value of a YAML text, None for an empty one. Raises DiffalignError as `compose_yaml` does."""
    node, loader = compose_yaml(text, source)
    try:
        return None if node is None else loader.construct_document(node)
    except ODD_VALUES as error:
        raise DiffalignError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error


def place_in(source: str, line: int) -> str:
    """Return how messages name a line, counted from 0, of a file; an argument of the command line has none."""
    return source if source.startswith("argument") else f"{source}:{line + 1}"


def _check_values(root: yaml.Node, source: str) -> None:
    """Refuse nodes that are nested too deeply, contain themselves, or stand for too many values by their aliases."""
    counted: dict[int, int] = {}  # the values of a node that is done; an alias is the same node again

    def count(node: yaml.Node, depth: int, above: tuple[int, ...]) -> int:
        if id(node) in above:
            raise DiffalignError(f"{place_in(source, node.start_mark.line)}: the anchor contains itself")
        if depth > MAX_DEPTH:
            where = place_in(source, node.start_mark.line)
            raise DiffalignError(f"{where}: not valid YAML: nested more than {MAX_DEPTH} levels deep")
        if id(node) not in counted:
            inner = (
                [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
                if (isinstance(node, yaml.CollectionNode))
                else []
            )
            counted[id(node)] = 1 + sum(count(one, depth + 1, (*above, id(node))) for one in inner)
        if counted[id(node)] > MAX_VALUES:
            raise DiffalignError(
                f"{place_in(source, node.start_mark.line)}: stands for more than {MAX_VALUES} values; aliases repeat them"
            )
        return counted[id(node)]

    count(root, 1, ())
