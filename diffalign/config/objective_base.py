"""What every objective's section of a config shares."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class ObjectiveSection(BaseModel):
    """Base of the objectives' sections."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    name: str
    compares: ClassVar[bool] = True
    """True where the loss compares the images of a group, so that a group needs at least two."""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the dataclass `OBJECTIVES[name]`."""
        return self.model_dump(exclude={"name"})
