"""Configs whose verb is not known beforehand: their `kind:` names it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from diffalign.config.load import KIND, KINDS, kind_of_run, load, resolved_yaml
from diffalign.config.recipes import config_path, read_document
from diffalign.errors import DiffalignError
from diffalign.files import dotted_keys
from diffalign.files.parse import parse_yaml

RUN_CONFIG = "config.yaml"


def any_path(source: str | Path) -> Path:
    """Return the file that `source` means: a file, a recipe, or a run directory, whose config.yaml is meant."""
    inside = Path(source) / RUN_CONFIG
    return inside if inside.is_file() else config_path(source)


def kind_of(path: Path) -> str:
    """Return the verb that reads a config file. Raises DiffalignError for a file that does not say it."""
    values = read_document(path).values
    kind = kind_of_run(values) if path.name == RUN_CONFIG else str(values.get(KIND, ""))
    if kind not in KINDS:
        raise DiffalignError(
            f"{path}: no kind: in it, so it is not known which verb reads it; one of {', '.join(KINDS)}"
        )
    return kind


def load_any(source: str | Path, overrides: Sequence[str] = ()) -> tuple[str, BaseModel]:
    """Return the verb and the checked config of a file, a recipe or a run directory. Raises DiffalignError as `load`."""
    path = any_path(source)
    kind = kind_of(path)
    return kind, load(kind, path, overrides)


def differences(first: str | Path, second: str | Path) -> list[str]:
    """Return `key: a -> b` for every key that differs, in the order of the first config.

    Raises DiffalignError for configs of two verbs.
    """
    (kind, a), (other, b) = load_any(first), load_any(second)
    if kind != other:
        raise DiffalignError(
            f"{first} is of `diffalign {kind}` and {second} of `diffalign {other}`; compare two of one verb"
        )
    old, new = (dotted_keys(dict(parse_yaml(resolved_yaml(config), kind))) for config in (a, b))
    return [
        f"{key}: {_shown(old, key)} -> {_shown(new, key)}" for key in {**old, **new} if old.get(key) != new.get(key)
    ]


def _shown(values: dict[str, object], key: str) -> str:
    """Return a value in a few words; a list of rewards or generators as their names."""
    if key not in values:
        return "(no such key)"
    value = values[key]
    if isinstance(value, list) and value and all(isinstance(one, dict) and "name" in one for one in value):
        return f"[{', '.join(str(one['name']) for one in value)}]"
    return "null" if value is None else str(value)
