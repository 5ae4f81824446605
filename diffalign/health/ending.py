"""What can be said of a run only when it ends, or when a report is made: whether it is finished, and long enough to judge."""

from collections.abc import Iterable
from dataclasses import dataclass

from diffalign.health.findings import Finding
from diffalign.health.row_checks import TOO_MANY_WEIGHTLESS, WINDOW, Row

TOO_SHORT, NOT_FINISHED, WITHOUT_SPREAD = "too_short", "not_finished", "labels_without_spread"
ENDINGS = (TOO_SHORT, NOT_FINISHED)
"""Findings that hold for a run as far as it has got, and not from a step on."""


@dataclass
class Ending:
    """A count of a run's rows, without storing them."""

    rows: int = 0
    last: int = 0
    judged: int = 0
    weightless: float = 0.0

    def add(self, row: Row) -> None:
        """Count a row of metrics.jsonl."""
        self.rows, self.last = self.rows + 1, int(row["step"])
        if "share_without_preference" in row:
            self.judged += 1
            self.weightless += row["share_without_preference"]

    @property
    def share_weightless(self) -> float:
        """The share of the groups drawn so far that state no preference, and so weigh nothing."""
        return self.weightless / self.judged if self.judged else 0.0

    def findings(self, steps: int | None) -> list[Finding]:
        """Return what holds at the end. steps: of the whole run; None where they are not known."""
        found = []
        if self.share_weightless > TOO_MANY_WEIGHTLESS:
            measured = f"{self.share_weightless:.0%} of the groups in {self.rows} logged steps"
            found.append(Finding(WITHOUT_SPREAD, self.last, measured))
        if self.rows < WINDOW:
            found.append(Finding(TOO_SHORT, self.last, f"{self.rows} of {WINDOW} logged steps"))
        if steps is not None and self.last < steps:
            found.append(Finding(NOT_FINISHED, self.last, f"stopped at {self.last} of {steps}"))
        return found


def examine_ending(rows: Iterable[Row], steps: int | None) -> list[Finding]:
    """Return what holds at the end of rows of metrics.jsonl, such as those of a run that was killed."""
    ending = Ending()
    for row in rows:
        ending.add(row)
    return ending.findings(steps)
