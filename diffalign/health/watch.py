"""The watch over a run: fed with rows in their order, it says every finding once, at the first step at which it holds."""

from collections import deque
from collections.abc import Iterable, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from diffalign.health.findings import Finding
from diffalign.health.rows import CHECKS, WINDOW, Row, loss_diverges, mean, no_spread

KEPT_ROWS = 120
# Validations without a gain while drift grows, before that is worth a note.
IDLE_VALIDATIONS = 3

Validation = dict[str, Any]
"""A row of validation.jsonl: {"step", "scores": {column: [a mean per prompt]}}; step 0 is the untrained model."""


def paired(now: Sequence[float | None], before: Sequence[float | None]) -> tuple[float, float]:
    """Mean difference over prompts and its standard error; prompts without a score in both are left out."""
    changes = [a - b for a, b in zip(now, before, strict=True) if a is not None and b is not None]
    if len(changes) < 2:
        return 0.0, float("inf")
    return fmean(changes), stdev(changes) / sqrt(len(changes))


class Watch:
    """`findings` so far, by name. The state follows from the rows alone, so a resumed run replays them."""

    def __init__(self, known: Iterable[Finding] = ()) -> None:
        self.findings: dict[str, Finding] = {f.name: f for f in known}
        self._rows: deque[Row] = deque(maxlen=KEPT_ROWS)
        self._first_losses: list[float] = []
        self._validations: list[tuple[Validation, float]] = []

    @property
    def alarms(self) -> list[Finding]:
        return [f for f in self.findings.values() if f.words.level == "alarm"]

    def row(self, row: Row) -> list[Finding]:
        """A row of metrics.jsonl (with its "step"); returns what is new."""
        self._rows.append(row)
        if len(self._first_losses) < WINDOW and "loss" in row:
            self._first_losses.append(row["loss"])
        # A step in which no group states a preference has no accuracy, margin or gaps to judge.
        telling = [r for r in self._rows if r.get("share_without_preference", 0.0) < 1.0]
        measured = {name: check(telling) for name, check in CHECKS.items() if name not in self.findings}
        if "labels_without_spread" not in self.findings:
            measured["labels_without_spread"] = no_spread(self._rows)
        if len(self._first_losses) == WINDOW and "loss_diverges" not in self.findings:
            measured["loss_diverges"] = loss_diverges(telling, fmean(self._first_losses))
        return self._new(int(row["step"]), measured)

    def validation(self, row: Validation) -> list[Finding]:
        """A row of validation.jsonl; returns what is new. The first column decides, as it does for `best`."""
        recent = list(self._rows)[-WINDOW:]
        drift = mean(recent, "drift") if recent and "drift" in recent[-1] else 0.0
        self._validations.append((row, drift))
        base, column = self._validations[0][0], next(iter(row["scores"]))
        if row is base or base["step"] != 0:
            return []
        difference, error = paired(row["scores"][column], base["scores"][column])
        measured: dict[str, str | None] = {}
        if difference + 2 * error < 0:
            measured["reward_below_base"] = f"{column} {difference:+.3f} ± {error:.3f} against the untrained model"
        measured["drift_without_reward"] = self._idle(column)
        return self._new(int(row["step"]), {k: v for k, v in measured.items() if k not in self.findings})

    def replay(self, rows: Iterable[Row], validations: Iterable[Validation]) -> None:
        """Rows and validations of a run so far; a validation of step n comes after the row of step n."""
        waiting = sorted(validations, key=lambda v: v["step"])
        for row in rows:
            while waiting and waiting[0]["step"] < row["step"]:
                self.validation(waiting.pop(0))
            self.row(row)
        for validation in waiting:
            self.validation(validation)

    def in_order(self) -> list[Finding]:
        return sorted(self.findings.values(), key=lambda f: f.step)

    def _idle(self, column: str) -> str | None:
        """No validation of the last few was better than the best before them, and drift has doubled since that best."""
        if len(self._validations) < IDLE_VALIDATIONS + 2:
            return None
        means = [fmean(v for v in row["scores"][column] if v is not None) for row, _ in self._validations]
        before, after = means[:-IDLE_VALIDATIONS], means[-IDLE_VALIDATIONS:]
        best = max(range(len(before)), key=before.__getitem__)
        then, now = self._validations[best][1], self._validations[-1][1]
        if max(after) > before[best] or not now > 2 * then:
            return None
        step = self._validations[best][0]["step"]
        return f"{column} was best at step {step} ({before[best]:.3f}); drift {then:.3g} then, {now:.3g} now"

    def _new(self, step: int, measured: dict[str, str | None]) -> list[Finding]:
        new = [Finding(name, step, text) for name, text in measured.items() if text is not None]
        self.findings |= {f.name: f for f in new}
        return new


def examine(
    rows: Iterable[Row], validations: Iterable[Validation] = (), known: Iterable[Finding] = ()
) -> list[Finding]:
    """All findings of a run, in the order in which they came up.

    rows: of metrics.jsonl; validations: of validation.jsonl; known: what was found before training (`examine_labels`).
    """
    watch = Watch(known)
    watch.replay(rows, validations)
    return watch.in_order()
