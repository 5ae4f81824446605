"""The `objective:` section, built from the dataclasses in `diffalign.objectives`: one strict section per objective.

A section has the dataclass's fields with their types, defaults, bounds and descriptions; `name` chooses it. Importing the
dataclasses does not import torch.
"""

from __future__ import annotations

import sys
from dataclasses import MISSING, Field, fields
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_type_hints

import pydantic
from pydantic import create_model, model_validator

from diffalign.config.section import Section
from diffalign.objectives import OBJECTIVES, Objective

STATED = ("description", "gt", "ge", "lt", "le")
"""What a field's metadata may say about it."""


class ObjectiveSection(Section):
    """Base of the objectives' sections."""

    name: str
    kind: ClassVar[type[Objective]]

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the objective."""
        return self.model_dump(exclude={"name"})

    def build(self) -> Objective:
        """Return the objective. Raises ValueError for values that do not fit each other."""
        return self.kind(**self.arguments())

    @model_validator(mode="after")
    def _fits(self) -> ObjectiveSection:
        self.build()
        return self


def objective_section(name: str, kind: type[Objective]) -> type[ObjectiveSection]:
    """Build the section of an objective from its dataclass; `name` is how a config calls it."""
    hints = get_type_hints(kind)
    given: dict[str, Any] = {"name": (Literal[name], pydantic.Field(name, description=kind.title or name))}
    for one in fields(kind):  # type: ignore[arg-type]  # every objective is a dataclass
        given[one.name] = (hints[one.name], _field(one))
    # An objective is one file, whose first line names the paper.
    meaning = (sys.modules[kind.__module__].__doc__ or kind.title or name).strip().splitlines()[0]
    made = create_model(f"{kind.__name__}Section", __base__=ObjectiveSection, __doc__=meaning, **given)
    made.kind = kind
    return made


def _field(one: Field[Any]) -> Any:
    """Return pydantic's form of a dataclass's field."""
    stated = {key: one.metadata[key] for key in STATED if key in one.metadata}
    if one.default_factory is not MISSING:
        return pydantic.Field(default_factory=one.default_factory, **stated)
    return pydantic.Field(... if one.default is MISSING else one.default, **stated)


OBJECTIVE_SECTIONS = {name: objective_section(name, kind) for name, kind in OBJECTIVES.items()}
DEFAULT_OBJECTIVE = OBJECTIVE_SECTIONS["dpo"](name="dpo")

if TYPE_CHECKING:
    AnyObjective = ObjectiveSection
else:
    AnyObjective = Annotated[reduce(or_, OBJECTIVE_SECTIONS.values()), pydantic.Field(discriminator="name")]


def fields_of(name: str) -> set[str]:
    """Return the keys of an objective's section, without `name`."""
    return set(OBJECTIVE_SECTIONS[name].model_fields) - {"name"}
