"""What every section of a config shares: strict reading, YAML's types, and how a check refuses a combination of values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError, to_jsonable_python

from diffalign.files.paths import NOT_PLAIN, is_plain_name
from diffalign.redaction import redacted

COMBINATION = "combination"

FilePath = Annotated[Path, Field(strict=False)]  # YAML has no paths: text becomes one
Betas = Annotated[tuple[float, float], Field(strict=False)]  # nor tuples: a list of two becomes one
Sizes = Annotated[tuple[int, int], Field(strict=False)]


def _plain_name(name: str) -> str:
    if not is_plain_name(name):
        raise ValueError(f"{name!r} {NOT_PLAIN}")
    return name


PlainName = Annotated[str, AfterValidator(_plain_name)]  # becomes a part of a file's name


MISSING = "is missing"
"""How the message begins where a key is needed that is not there."""
LARGEST = 10**9
"""The largest whole number of a config but a seed; those that decide how much memory is taken have lower bounds."""
LARGEST_SEED = 2**63 - 1
MOST_PIXELS = 16_384  # a side
MOST_IMAGES = 100_000  # of a prompt, and at once
MOST_STEPS = 1000  # of a sampler: as many as a model was trained with
MOST_PROMPTS = 10_000_000
MOST_THREADS = 4096
MOST_RANK = 16_384


@dataclass(frozen=True)
class OnResume:
    """What a new value of a key does to a run that resumes. A key without this makes it another run, which is refused.

    effect: none: no number of the training changes; rounding: only last digits may; named: none, where the value stands for
    the same as before (a moved folder with the same content); derived: it makes another run, as without this.
    only_where: keys and the values that they must have, in the checkpoint's config or the new one, which matters where they may
    change themselves; else the key makes another run.
    formerly: the value of runs from before there was the key, where it is not the default; ...: the default.
    pending: the value that stands for what is found only when model and data are loaded; ...: none does.
    """

    effect: Literal["none", "rounding", "named", "derived"]
    only_where: tuple[tuple[str, object], ...] = ()
    formerly: object = ...
    pending: object = ...


UNAFFECTED, ROUNDING, NAMED = OnResume("none"), OnResume("rounding"), OnResume("named")
DERIVED = OnResume("derived", pending=None)


class Section(BaseModel):
    """A strict and frozen section: `steps: "400"`, `steps: true` and `lr: .nan` are mistakes; change with `model_copy`.

    A check of one value stands on its field. A check of values against each other is a validator of the smallest class
    that holds them all, and calls `refuse` with keys relative to that class.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    late: ClassVar[tuple[str, ...]] = ()
    """Keys that are read and printed after those of the subclasses."""

    @classmethod
    def reading_order(cls) -> list[str]:
        """Return the section's keys in reading order: `kind`, then the general ones, its own, and those of `late`."""
        kind = [key for key in cls.model_fields if key == "kind"]
        late = [key for key in cls.late if key in cls.model_fields]
        return [*kind, *(key for key in cls.model_fields if key not in (*kind, *late)), *late]

    @model_validator(mode="after")
    def _check_whole_numbers(self) -> Section:
        for name, value in self:
            given = value if isinstance(value, list | tuple) else [value]
            limit = LARGEST_SEED if name == "seed" else LARGEST
            if any(type(one) is int and abs(one) > limit for one in given):
                refuse(f"a whole number above {limit} is a mistake; give a smaller one", name)
        return self

    @model_serializer(mode="wrap")
    def _without_secrets(self, values: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """Leave tokens out of what is written (JSON); in Python the section keeps them."""
        plain: dict[str, Any] = values(self)
        return redacted(plain) if info.mode == "json" else plain

    text_key: ClassVar[str | None] = None
    """The key that a text in the section's place gives: `reward: pickscore` is `reward: {name: pickscore}`."""

    def resume_rules(self) -> dict[str, OnResume]:
        """Return dotted keys of this config and what new values of them do on resume; a section's rule holds for all in it."""
        found: dict[str, OnResume] = {}
        for key, value in self:
            if (rule := _rule(type(self), key)) is not None:
                found[key] = rule
            if isinstance(value, Section):
                found |= {f"{key}.{inner}": rule for inner, rule in value.resume_rules().items()}
        return found

    def former_values(self) -> dict[str, Any]:
        """Return plain values, nested, of a run that was written before there were these keys: mostly the defaults."""
        found: dict[str, Any] = {}
        for key, value in self:
            rule, field = _rule(type(self), key), type(self).model_fields[key]
            if isinstance(value, Section):
                found[key] = value.former_values()
            elif rule is not None and rule.formerly is not ...:
                found[key] = rule.formerly
            elif not field.is_required():
                found[key] = to_jsonable_python(field.get_default(call_default_factory=True))
        return found

    @model_validator(mode="before")
    @classmethod
    def _abbreviated(cls, value: object) -> object:
        """Read a text as the section's `text_key`, and `tune:` with every key commented out as the defaults."""
        if isinstance(value, str) and cls.text_key is not None:
            return {cls.text_key: value}
        return {} if value is None else value


def _rule(section: type[Section], key: str) -> OnResume | None:
    return next((one for one in section.model_fields[key].metadata if isinstance(one, OnResume)), None)


def by_name(value: object) -> object:
    """Read a text in the place of one of several sections as its `name`: `objective: ipo`."""
    return {"name": value} if isinstance(value, str) else value


def refuse(message: str, *keys: str) -> NoReturn:
    """Raise the error of a combination of values that cannot work.

    `message`: what is wrong and the way out. `keys`: dotted, relative to the section whose validator calls this, the
    likeliest culprit first; `explain` puts the section's own place before them.
    """
    raise PydanticCustomError(COMBINATION, "{message}", {"message": message, "keys": keys})


def refuse_twice(names: Iterable[str], what: str, *keys: str) -> None:
    """Refuse a list in which a name stands twice; `what` says what is named, such as "a reward"."""
    names = list(names)
    if len(set(names)) < len(names):
        refuse(f"{what} is named twice", *keys)


def keys_of(model: type[BaseModel]) -> list[str]:
    """Return the keys of a section in reading order, and those of another model as it declares them."""
    return model.reading_order() if issubclass(model, Section) else list(model.model_fields)
