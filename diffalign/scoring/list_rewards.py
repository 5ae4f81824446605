"""List the rewards in 80 columns: what each needs and reads, and whose weights it uses.

Rewards of this package are read from `rewards.json`, since importing their classes would import torch. This module, run as
a program by `make docs`, writes that file; a test compares it with the classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from diffalign.files import write_whole
from diffalign.plugins import REWARD_GROUP, offered_names
from diffalign.terminal import WordsCell

if TYPE_CHECKING:
    from diffalign.scoring.describe_rewards import Described

WRITTEN = Path(__file__).with_name("rewards.json")


def rewards_table(names: Iterable[str] = ()) -> tuple[Table, list[str]]:
    """Return a table of all rewards, or of these with their details, and why others are not listed.

    Raises DiffalignError for an unknown name.
    """
    names = list(names)
    problems: list[str] = []
    found: dict[str, Described] = json.loads(WRITTEN.read_text(encoding="utf-8"))
    if names:
        found = {name: found.get(name) or _of_class(name) for name in names}
    elif offered_names(REWARD_GROUP):
        others, problems = _foreign()
        found |= others
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    shown.add_column(no_wrap=True)
    shown.add_column()
    for name, one in found.items():
        lines = [*one["facts"], *(one["details"] if names else ())]
        shown.add_row(Text(name, "bold"), Group(*map(WordsCell, lines)))
    return shown, problems


def _of_class(name: str) -> Described:
    """Describe a reward that `rewards.json` does not hold, by its class. Raises DiffalignError if there is none."""
    from diffalign.rewards import find_reward
    from diffalign.scoring.describe_rewards import describe

    return describe(name, find_reward(name))


def _foreign() -> tuple[dict[str, Described], list[str]]:
    """Return the rewards of other packages, described, and why some cannot be used."""
    from diffalign.rewards import foreign_rewards
    from diffalign.scoring.describe_rewards import describe

    others, problems = foreign_rewards()
    return {name: describe(name, kind) for name, kind in others.items()}, problems


if __name__ == "__main__":
    from diffalign.scoring.describe_rewards import written

    write_whole(WRITTEN, written())
