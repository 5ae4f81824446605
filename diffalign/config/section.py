"""What every section of a config shares, and how YAML's lists and texts become paths and tuples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

FilePath = Annotated[Path, Field(strict=False)]  # YAML has no paths: text becomes one
Betas = Annotated[tuple[float, float], Field(strict=False)]  # nor tuples: a list of two becomes one
Sizes = Annotated[tuple[int, int], Field(strict=False)]


class Section(BaseModel):
    """Strict: `steps: "400"`, `steps: true` and `lr: .nan` are mistakes. Frozen: change with `model_copy`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        """`tune:` with every key below it commented out is the section with its defaults."""
        return {} if value is None else value
