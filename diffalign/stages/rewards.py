"""`diffalign rewards`: list the rewards. Nothing here imports torch."""

from collections.abc import Iterable

from diffalign.progress import say, say_aside
from diffalign.scoring.list_rewards import rewards_table
from diffalign.terminal import show_table


def show_rewards(names: Iterable[str] = ()) -> None:
    """Print the rewards, or more about some of them: `diffalign rewards`."""
    names = list(names)
    shown, problems = rewards_table(names)
    if not names:
        say(f"{shown.row_count} rewards; higher is better. `diffalign rewards NAME` says more of one.")
    show_table(shown)
    for problem in problems:
        say_aside(f"not listed: {problem}")
