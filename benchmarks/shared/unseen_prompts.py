"""Prompts of the embedded world of kinds that no training caption has."""

from typing import Any

import numpy as np

from diffalign.testbed.scenes import COLORS, SHAPES
from diffalign.testbed.shape_prompts import plural


def out_of_distribution(n: int) -> list[dict[str, Any]]:
    """Prompts of three kinds that no training caption has, with the metadata that the reward reads."""
    rng = np.random.default_rng(7)
    rows: list[dict[str, Any]] = []
    while len(rows) < n:
        shapes = [str(s) for s in rng.permutation(list(SHAPES))[:3]]
        colors = [str(c) for c in rng.choice(list(COLORS), 3)]
        kind = len(rows) % 3
        if kind == 0:
            include = [{"class": s, "count": 1, "color": c} for s, c in zip(shapes, colors, strict=True)]
            text, tag = " and ".join(f"a {c} {s}" for s, c in zip(shapes, colors, strict=True)), "three_objects"
        elif kind == 1:
            include = [{"class": shapes[0], "count": 2, "color": colors[0]}, {"class": shapes[1], "count": 1}]
            text, tag = f"two {colors[0]} {plural(shapes[0])} and a {shapes[1]}", "count_and_object"
        else:
            include = [{"class": shapes[0], "count": 5, "color": colors[0]}]
            text, tag = f"five {colors[0]} {plural(shapes[0])}", "five"
        row: dict[str, Any] = {"prompt": text, "tag": tag, "include": include}
        if kind == 2:
            row["exclude"] = [{"class": shapes[0], "count": 6}]
        if text not in {r["prompt"] for r in rows}:
            rows.append(row)
    return rows
