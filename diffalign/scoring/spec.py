"""Parse `--reward [LABEL=]NAME[:key=value,...]`: the reward, its label in the output, and its options."""

import re
from dataclasses import dataclass, field
from typing import Any

from diffalign.errors import DiffalignError

LABEL = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class RewardSpec:
    """label: the column in the output. name: a key of REWARDS. options: arguments of the reward."""

    label: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)


def parse(text: str) -> RewardSpec:
    """Return the parts of one `--reward`. Raises DiffalignError if it has another form."""
    head, _, tail = text.partition(":")
    label, equals, name = head.partition("=")
    label, name = (label, name) if equals else (head, head)
    if not LABEL.fullmatch(label) or not name:
        raise DiffalignError(f"--reward {text!r}: write NAME, NAME:key=value,key=value or LABEL=NAME:key=value")
    options: dict[str, Any] = {}
    for pair in filter(None, tail.split(",")):
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise DiffalignError(f"--reward {text!r}: option {pair!r} is not key=value")
        options[key.strip()] = _value(value.strip())
    return RewardSpec(label, name, options)


def parse_all(texts: list[str]) -> list[RewardSpec]:
    """Return specs with different labels. Raises DiffalignError if two would share a column."""
    specs = [parse(text) for text in texts]
    labels = [spec.label for spec in specs]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise DiffalignError(f"--reward: two are called {twice!r}; give one another label, as in other={twice}:...")
    return specs


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
