"""Watch a run: fed with rows in their order, report every finding once, at the first step at which it holds."""

from collections import deque
from collections.abc import Iterable, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from diffalign.health.ending import Ending
from diffalign.health.findings import Finding
from diffalign.health.row_checks import (
    CHECKS,
    WINDOW,
    Row,
    Tally,
    accuracy_stuck,
    diversity_falls,
    loss_diverges,
    loss_per_group,
    mean,
    no_spread,
)

KEPT_ROWS = 6 * WINDOW
JUDGED_ROWS = 2 * WINDOW
# Each validation may fall by chance: at 2 standard errors, one in ten unchanged runs would be called worse after five.
WORSE_BY = 2.5
# The best of several is too high by about one standard error, so two more are required.
PICKED = 3.0
# Validations without a gain, while drift grows, before a note is made.
IDLE_VALIDATIONS = 3

Validation = dict[str, Any]
"""A row of validation.jsonl: {"step", "scores": {column: [a mean per prompt]}}; step 0 is the untrained model."""


def paired(now: Sequence[float | None], before: Sequence[float | None]) -> tuple[float, float]:
    """Return the mean difference over prompts and its standard error; prompts without both scores are left out."""
    changes = [a - b for a, b in zip(now, before, strict=True) if a is not None and b is not None]
    if len(changes) < 2:
        return 0.0, float("inf")
    return fmean(changes), stdev(changes) / sqrt(len(changes))


class Watch:
    """The findings so far, by name. The state follows from the rows alone, so a resumed run replays them."""

    def __init__(self, known: Iterable[Finding] = ()) -> None:
        self.findings: dict[str, Finding] = {f.name: f for f in known}
        self._rows: deque[Row] = deque(maxlen=KEPT_ROWS)
        self._first_losses: list[float] = []
        self._accuracies = Tally()
        self._highest_rate = 0.0
        self._validations: list[tuple[Validation, float]] = []
        self.ending = Ending()

    @property
    def alarms(self) -> list[Finding]:
        """The findings that are alarms."""
        return [f for f in self.findings.values() if f.words.level == "alarm"]

    def row(self, row: Row) -> list[Finding]:
        """Take a row of metrics.jsonl (with its "step"); return the new findings."""
        self._rows.append(row)
        self.ending.add(row)
        # A step in which no group states a preference has no loss, accuracy, margin or gaps to judge.
        if row.get("share_without_preference", 0.0) < 1.0:
            self._remember(row)
        # Checks of losses and margins see the newest rows that have them; the other checks have their own window.
        telling = [r for r in self._rows if r.get("share_without_preference", 0.0) < 1.0][-JUDGED_ROWS:]
        measured = {name: check(telling) for name, check in CHECKS.items() if name not in self.findings}
        measured["labels_without_spread"] = no_spread(self._rows)
        measured["diversity_falls"] = diversity_falls(self._rows)
        measured["loss_diverges"] = loss_diverges(telling, self._first_losses)
        measured["accuracy_stuck"] = accuracy_stuck(self._accuracies)
        return self._new(int(row["step"]), measured)

    def validation(self, row: Validation) -> list[Finding]:
        """Take a row of validation.jsonl; return the new findings. The first column decides, as it does for `best`."""
        recent = list(self._rows)[-WINDOW:]
        drift = mean(recent, "drift") if recent and "drift" in recent[-1] else 0.0
        self._validations.append((row, drift))
        base, column = self._validations[0][0], next(iter(row["scores"]))
        if row is base or base["step"] != 0:
            return []
        difference, error = paired(row["scores"][column], base["scores"][column])
        measured: dict[str, str | None] = {}
        if difference + WORSE_BY * error < 0:
            measured["reward_below_base"] = f"{column} {difference:+.3f} ± {error:.3f} against the untrained model"
        measured["drift_without_reward"] = self._idle(column)
        return self._new(int(row["step"]), measured)

    def replay(self, rows: Iterable[Row], validations: Iterable[Validation]) -> None:
        """Take the rows and validations of a run so far; a validation of step n comes after the row of step n."""
        waiting = sorted(validations, key=lambda v: v["step"])
        for row in rows:
            while waiting and waiting[0]["step"] < row["step"]:
                self.validation(waiting.pop(0))
            self.row(row)
        for validation in waiting:
            self.validation(validation)

    def in_order(self) -> list[Finding]:
        """Return all findings, ordered by step."""
        return sorted(self.findings.values(), key=lambda f: f.step)

    def end(self, steps: int | None) -> list[Finding]:
        """Take what holds now that the run of `steps` steps ends; return the new findings."""
        new = [finding for finding in self.ending.findings(steps) if finding.name not in self.findings]
        self.findings |= {finding.name: finding for finding in new}
        return new

    def _remember(self, row: Row) -> None:
        if len(self._first_losses) < WINDOW and "loss" in row:  # distillation logs losses of its own
            self._first_losses.append(loss_per_group(row))
        if row.get("lr", 0.0) > self._highest_rate:  # still warming up: earlier accuracies mean little
            self._highest_rate = row["lr"]
            self._accuracies = Tally()
        if "accuracy" in row:
            self._accuracies.add(row["accuracy"])

    def _idle(self, column: str) -> str | None:
        """Detect drift without gain since the best of the validations before the last few.

        Drift has doubled, and the reward has clearly not risen by half of what had clearly been gained by then. That no
        later validation beats the best is no evidence, since the best was partly chosen by chance.
        """
        if len(self._validations) < IDLE_VALIDATIONS + 2:
            return None
        scores = [row["scores"][column] for row, _ in self._validations]
        means = [fmean(v for v in values if v is not None) for values in scores]
        best = max(range(len(scores) - IDLE_VALIDATIONS), key=means.__getitem__)
        then, now = self._validations[best][1], self._validations[-1][1]
        lately = [None if None in values else fmean(values) for values in zip(*scores[-IDLE_VALIDATIONS:], strict=True)]
        difference, error = paired(lately, scores[best])
        gain, gain_error = paired(scores[best], scores[0])
        sure_gain = max(gain - PICKED * gain_error, 0.0)
        if difference + PICKED * error >= 0.5 * sure_gain or not now > 2 * then:
            return None
        step = self._validations[best][0]["step"]
        return (
            f"{column} {difference:+.3f} ± {error:.3f} in {IDLE_VALIDATIONS} validations against step {step}; drift {then:.3g} "
            f"then, {now:.3g} now"
        )

    def _new(self, step: int, measured: dict[str, str | None]) -> list[Finding]:
        new = [Finding(name, step, text) for name, text in measured.items() if text and name not in self.findings]
        self.findings |= {f.name: f for f in new}
        return new


def examine(
    rows: Iterable[Row], validations: Iterable[Validation] = (), known: Iterable[Finding] = ()
) -> list[Finding]:
    """Return all findings of a run, in the order in which they came up.

    rows: of metrics.jsonl. validations: of validation.jsonl. known: found before training (`examine_labels`).
    """
    watch = Watch(known)
    watch.replay(rows, validations)
    return watch.in_order()
