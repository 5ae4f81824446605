"""Describe rewards by their classes, in the lines that `diffalign rewards` shows."""

import inspect
import json
import math
from typing import TypedDict

from diffalign.rewards import REWARDS, Reward, accepted


class Described(TypedDict):
    """Lines about a reward. facts: what a user needs to choose it. details: in its own words, its columns, its options."""

    facts: list[str]
    details: list[str]


def describe(name: str, kind: type[Reward]) -> Described:
    """Return the lines about a reward: what a user needs to choose it, and the rest."""
    return {"facts": _facts(kind), "details": _details(name, kind)}


def written() -> str:
    """Return the content of `rewards.json`: every reward of this package, described."""
    described = {name: describe(name, kind) for name, kind in REWARDS.items()}
    return json.dumps(described, indent=2, ensure_ascii=False) + "\n"


def _facts(kind: type[Reward]) -> list[str]:
    """Return what a user needs to choose a reward."""
    first = [f"usually {kind.usual}" if kind.usual else _range(*kind.range)]
    first += [f"reads the {' and '.join(kind.reads)}"] if kind.reads else []
    first += ["gradient"] if kind.differentiable else []
    first += [kind.size if kind.size != "none" else "no weights"]
    first += [f"needs {', '.join(kind.requires)}"] if kind.requires else []
    return ["; ".join(first), *([kind.weights] if kind.weights != "none" else []), kind.licence]


def _range(low: float, high: float) -> str:
    if math.isfinite(low) and math.isfinite(high):
        return f"{low:.3g} to {high:.3g}"
    return (
        f"at least {low:.3g}" if math.isfinite(low) else f"at most {high:.3g}" if math.isfinite(high) else "unbounded"
    )


def _details(name: str, kind: type[Reward]) -> list[str]:
    """Return what else is known: in the class's words, its columns and its options."""
    about = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    columns = [f"columns: {', '.join(kind.columns)}"] if len(kind.columns) > 1 else []
    options = [f"options: {', '.join(sorted(accepted(name)))}"] if accepted(name) else []
    return [*([about] if about else []), *columns, *options]
