"""Items as `score` finds them, and scores of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign.data.containers import FileOrigin
from diffalign.scoring.items import Item
from diffalign.scoring.run import Scores
from diffalign.scoring.sources import Prompting, collect


def prompts_of(sources: list[str], **options: Any) -> dict[str, str | None]:
    return {item.key: item.prompt for item in collect(sources, Prompting(**options))}


def made(values: list[float], prompts: list[str | None], keys: list[str] | None = None, side: str = "a") -> Scores:
    keys = keys or [f"{i}.png" for i in range(len(values))]
    items = [Item(f"{side}/{k}", k, FileOrigin(Path(k)), p) for k, p in zip(keys, prompts, strict=True)]
    rows = [{"image": i.name, "reason": "", "r": v, "r.reason": ""} for i, v in zip(items, values, strict=True)]
    return Scores(rows, {"r": ("r",)}, items=items)
