"""List the rewards in 80 columns: what each needs and reads, and whose weights it uses."""

import inspect
import math
from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from diffalign.rewards import REWARDS, Reward, accepted, find_reward, foreign_rewards


def rewards_table(names: Iterable[str] = ()) -> tuple[Table, list[str]]:
    """Return a table of all rewards, or of these with their columns and options, and why others are not listed.

    Raises DiffalignError for an unknown name.
    """
    names = list(names)
    problems: list[str] = []
    if names:
        kinds = {name: find_reward(name) for name in names}
    else:
        others, problems = foreign_rewards()
        kinds = REWARDS | others
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")
    for name, kind in kinds.items():
        lines = [*_facts(kind), *(_details(name, kind) if names else ())]
        shown.add_row(Text(name, "bold"), Text("\n".join(lines)))  # as text: rich would take diffalign[ocr] for a style
    return shown, problems


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
