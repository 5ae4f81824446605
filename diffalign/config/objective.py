"""The `objective:` section, built from the dataclasses in `diffalign.objectives`: one strict section per objective.

A section has the dataclass's fields with their types, defaults, bounds and descriptions; `name` chooses it. Importing our
dataclasses does not import torch. Objectives of other packages get their section when a config names them.
"""

from __future__ import annotations

import sys
from dataclasses import MISSING, Field, fields
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_type_hints

import pydantic
from pydantic import (
    SerializeAsAny,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
    model_validator,
)

from diffalign.config.section import OnResume, Section, by_name
from diffalign.errors import DiffalignError
from diffalign.objectives import GROUP, OBJECTIVES, Objective, find_objective
from diffalign.plugins import offered_names

STATED = ("description", "gt", "ge", "lt", "le")
"""What a field's metadata may say about it."""


class ObjectiveSection(Section):
    """Base of the objectives' sections."""

    text_key: ClassVar[str | None] = "name"

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
    """Build the section of an objective from its dataclass; `name` is how a config calls it.

    Raises ValueError for a field whose name a section needs for itself.
    """
    hints = get_type_hints(kind)
    given: dict[str, Any] = {"name": (Literal[name], pydantic.Field(name, description=kind.title or name))}
    for one in fields(kind):  # type: ignore[arg-type]  # every objective is a dataclass
        if one.name in (*given, *dir(ObjectiveSection)):
            raise ValueError(f"the name {one.name!r} is taken; choose another")
        kind_of: Any = hints[one.name]
        if "formerly" in one.metadata:  # runs from before the field had this value, which may not be the default
            kind_of = Annotated[kind_of, OnResume("derived", formerly=one.metadata["formerly"])]
        given[one.name] = (kind_of, _field(one))
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
FOREIGN_SECTIONS: dict[str, type[ObjectiveSection]] = {}
"""Those of other packages that a config has named so far."""
DEFAULT_OBJECTIVE = OBJECTIVE_SECTIONS["dpo"](name="dpo")


def section_of(name: str) -> type[ObjectiveSection]:
    """Return the section of an objective. Raises DiffalignError for a name that is no objective."""
    if name in OBJECTIVE_SECTIONS:
        return OBJECTIVE_SECTIONS[name]
    if name not in FOREIGN_SECTIONS:
        kind = find_objective(name)
        try:
            FOREIGN_SECTIONS[name] = objective_section(name, kind)
        except (NameError, TypeError, ValueError, pydantic.errors.PydanticUserError) as error:
            said = str(error).splitlines()[0]
            raise DiffalignError(
                f"{name}: the fields of {kind.__name__} make no section of a config: {said}"
            ) from error
    return FOREIGN_SECTIONS[name]


def _of_another_package(value: Any, ours: ValidatorFunctionWrapHandler) -> ObjectiveSection:
    """Validate an objective of another package; the union validates ours, and refuses names that nobody offers."""
    if isinstance(value, ObjectiveSection):
        return value
    value = by_name(value)
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or name in OBJECTIVES or not (":" in name or name in offered_names(GROUP)):
        section: ObjectiveSection = ours(value)
        return section
    try:
        both: Any = section_of(name) | OBJECTIVE_SECTIONS["dpo"]
    except DiffalignError as error:
        raise ValueError(str(error)) from None
    # A union of two, so that pydantic's location of an error holds the name, as it does for ours.
    checked: ObjectiveSection = TypeAdapter(Annotated[both, pydantic.Field(discriminator="name")]).validate_python(
        value
    )
    return checked


if TYPE_CHECKING:
    AnyObjective = ObjectiveSection
else:
    AnyObjective = SerializeAsAny[
        Annotated[
            reduce(or_, OBJECTIVE_SECTIONS.values()),
            pydantic.Field(discriminator="name"),
            WrapValidator(_of_another_package),
        ]
    ]
