"""Measures of a judge against people: a row of numbers for each judge, and all of them as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffalign.judge.metrics import LEVELS, MARGIN, calibration, crps, plcc, preference_accuracy, srcc
from diffalign.judge.records import Rated

COLUMNS = {
    "plcc": "PLCC", "srcc": "SRCC", "hpa": "HPA", "margin_hpa": "margin HPA", "crps": "CRPS",
    "calibration_error": "calibration error", "tokens": "tokens / image", "images_per_second": "images / s",
}  # fmt: skip


def measures(rated: Sequence[Rated], probabilities: np.ndarray) -> dict[str, Any]:
    """Measure predicted `probabilities` [N, 9] against N rated images.

    CRPS and calibration look at single ratings, the others at aggregated scores.

    Pairs are images of one prompt and dimension. `bins`: expected and observed score of each bin of the calibration.
    """
    mu = probabilities @ LEVELS
    human = np.array([one.score for one in rated])
    prompts = [f"{one.dimension}\n{one.prompt}" for one in rated]
    counts = [len(one.ratings) for one in rated]
    ratings = np.array([rating for one in rated for rating in one.ratings])
    repeated = np.repeat(probabilities, counts, axis=0)
    fit = calibration(repeated, ratings)
    hpa, pairs = preference_accuracy(mu, human, prompts)
    margin_hpa, margin_pairs = preference_accuracy(mu, human, prompts, MARGIN)
    return {
        "images": len(rated),
        "plcc": plcc(mu, human),
        "srcc": srcc(mu, human),
        "hpa": hpa,
        "pairs": pairs,
        "margin_hpa": margin_hpa,
        "margin_pairs": margin_pairs,
        "crps": float(crps(repeated, ratings).mean()),
        "calibration_error": fit.error,
        "spread_expected": fit.spread_expected,
        "spread_observed": fit.spread_observed,
        "bins": [list(one) for one in zip(fit.expected, fit.observed, fit.counts, strict=True)],
    }


def by_dimension(rated: Sequence[Rated], probabilities: np.ndarray) -> dict[str, dict[str, Any]]:
    """Return the `measures` of all images under "all", and of each dimension where there are several."""
    found = {"all": measures(rated, probabilities)}
    names = list(dict.fromkeys(one.dimension for one in rated))
    for name in names if len(names) > 1 else ():
        own = [i for i, one in enumerate(rated) if one.dimension == name]
        found[name] = measures([rated[i] for i in own], probabilities[own])
    return found


def table(rows: Mapping[str, Mapping[str, object]], first: str = "judge") -> str:
    """Format as Markdown: a row for each judge (or dimension), the columns of `COLUMNS` that any of them has."""
    columns = [key for key in COLUMNS if any(key in row for row in rows.values())]
    lines = [f"| {first} | {' | '.join(COLUMNS[c] for c in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        values = [
            f"{row[c]:.4f}" if c not in ("tokens", "images_per_second") else f"{row[c]:.1f}"
            for c in columns
            if c in row
        ]
        lines.append(f"| {name} | {' | '.join(values)} |" + " |" * (len(columns) - len(values)))
    return "\n".join(lines)
