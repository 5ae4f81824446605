"""Parse `[LABEL=]NAME[:key=value,...]`, as after `--reward`: the reward, its label in the output, and its options.

Messages begin with `said_as`: how the user named rewards, `--reward` or an argument of Python.

NAME may be `module:Class`. The part behind the first colon is a class if it is a plain word and the part before it is no
reward of ours; options always hold an `=`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffalign.errors import DiffalignError
from diffalign.remote_address import remote_label
from diffalign.rewards import REWARDS, Reward, find_reward
from diffalign.rewards.base import LABEL, TAKEN_NAMES


@dataclass(frozen=True)
class RewardSpec:
    """One reward to score with. label: its column in the output; name: of the reward; options: the reward's arguments."""

    label: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)


def parse(text: str, said_as: str = "--reward") -> RewardSpec:
    """Return the parts of the text of a reward. The label of `module:Class` is the class's own name.

    Raises DiffalignError if the text has another form, and for a class that is no reward.
    """
    head, _, tail = text.partition(":")
    label, equals, name = head.partition("=")
    name = name if equals else head
    kind, _, options_of_kind = tail.partition(":")
    if kind.isidentifier() and name not in REWARDS:
        name, tail = f"{name}:{kind}", options_of_kind
    return _checked(label if equals else None, name, parse_options(tail, f"{said_as} {text!r}"), f"{said_as} {text!r}")


def _checked(label: str | None, name: str, options: dict[str, Any], said: str) -> RewardSpec:
    """Return a spec, with the reward's own label where none is given. said: what messages begin with."""
    if label is None and name == "remote":
        label = remote_label(options.get("url"))
    elif label is None:
        label = find_reward(name).name if ":" in name else name
    if not LABEL.fullmatch(label) or not name:
        raise DiffalignError(f"{said}: write NAME, NAME:key=value,key=value or LABEL=NAME:key=value")
    if label in TAKEN_NAMES:
        raise DiffalignError(f"{said}: {label} is a column of every table; give it another label")
    return RewardSpec(label, name, options)


def parse_options(text: str, where: str) -> dict[str, Any]:
    """Return the options in `key=value,key=value`. Raises DiffalignError, naming `where`, if the text has another form."""
    options: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise DiffalignError(f"{where}: option {pair!r} is not key=value")
        options[key.strip()] = _value(value.strip())
    return options


def parse_all(texts: list[str]) -> list[RewardSpec]:
    """Return specs with different labels. Raises DiffalignError if two would share a column."""
    specs = [parse(text) for text in texts]
    check_labels([spec.label for spec in specs])
    return specs


def check_labels(labels: list[str], said_as: str = "--reward") -> None:
    """Raise DiffalignError if two rewards would share a column."""
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise DiffalignError(f"{said_as}: two are called {twice!r}; give one another label, as in other={twice}:...")


def spec_of(given: str | RewardSpec | Mapping[str, Any], said_as: str = "rewards") -> RewardSpec:
    """Return the spec of a reward as Python code names it: a text as after `--reward`, a spec, or a section of a config.

    A section has a name, and may have a label, a detector and options; any other key is an option, such as `weights`.
    """
    if isinstance(given, RewardSpec):
        return given
    if isinstance(given, str):
        return parse(given, said_as)
    if not isinstance(given, Mapping):
        raise DiffalignError(
            f"{said_as}: {type(given).__name__} is no reward; give a name, a section or a built reward"
        )
    options = {key: value for key, value in given.items() if key not in ("name", "label", "options")}
    options |= given.get("options", {})
    name = given.get("name")
    if not isinstance(name, str) or not name:
        raise DiffalignError(f"{said_as}: {dict(given)!r} has no name; write {{'name': 'pickscore', ...}}")
    return _checked(given.get("label"), name, options, f"{said_as} {name!r}")


def rewards_named(given: object) -> dict[str, RewardSpec | Reward]:
    """Return what Python code named as `rewards`, by label: one or several texts, sections, specs or built rewards.

    Raises DiffalignError for anything else, and for two of one label.
    """
    if not isinstance(given, (str, Mapping, Reward, RewardSpec, Iterable)):
        raise DiffalignError(f"rewards: {type(given).__name__} is no reward; name one, such as 'pickscore'")
    listed = [given] if isinstance(given, (str, Mapping, Reward, RewardSpec)) else list(given)
    if not listed:
        raise DiffalignError("rewards: none is given; name one, such as 'pickscore'")
    named = [one if isinstance(one, Reward) else spec_of(one) for one in listed]
    labels = [one.name if isinstance(one, Reward) else one.label for one in named]
    check_labels(labels, "rewards")
    return dict(zip(labels, named, strict=True))


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
