"""Check the newest logged rows. Each check takes rows (oldest first) and returns what it measured, or None.

Checks are relative, so that they carry over to other models, objectives and values of beta: errors as shares of the
reference's, the sigmoid's pull against how far the errors moved, a loss against the spread of the first losses, an
accuracy only if there are enough groups to tell it from chance. A single step never decides: with a large beta one
group of eight can have a loss of 12 in a run that goes well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import fmean, median, quantiles, stdev

Row = dict[str, float]
Check = Callable[[Sequence[Row]], str | None]

WINDOW = 20
"""Single steps are noise: checks use the mean or median of this many logged rows."""
NEAR_CHANCE = 0.55
"""An accuracy or agreement that is clearly below this is useless, since chance gives 0.5."""

TOO_MANY_WEIGHTLESS = 0.5
"""The share of groups that may state no preference."""


def mean(rows: Sequence[Row], name: str) -> float:
    """Return the mean of a metric's finite values; NaN if there is none."""
    values = [row[name] for row in rows if isfinite(row[name])]
    return fmean(values) if values else float("nan")


def share(rows: Sequence[Row], name: str) -> float:
    """Return the median of name / reference_error over rows; both come from the same groups and times."""
    values = [row[name] / row["reference_error"] for row in rows if row["reference_error"] > 0 and isfinite(row[name])]
    return median(values) if values else 0.0


def has(rows: Sequence[Row], *names: str, count: int = WINDOW) -> bool:
    """Return whether there are enough rows, with these metrics in them."""
    return len(rows) >= count and all(name in rows[-1] for name in names)


def no_spread(rows: Sequence[Row]) -> str | None:
    """Detect that more than half of the groups state no preference."""
    if not has(rows, "share_without_preference"):
        return None
    without = mean(list(rows)[-WINDOW:], "share_without_preference")
    return f"{without:.0%} of the groups" if without > TOO_MANY_WEIGHTLESS else None


ACCURACY_ROWS, ACCURACY_SKIPPED = 80, 40


@dataclass
class Tally:
    """Mean and standard error of all values but the first `skipped`, without storing them: runs may be long."""

    skipped: int = ACCURACY_SKIPPED
    seen: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        """Add a value."""
        self.seen += 1
        if self.seen > self.skipped:
            self.total += value
            self.squares += value * value

    @property
    def count(self) -> int:
        """How many values count."""
        return max(self.seen - self.skipped, 0)

    @property
    def mean(self) -> float:
        """The mean of the values that count."""
        return self.total / self.count

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        variance = (self.squares - self.total**2 / self.count) / (self.count - 1)
        return sqrt(max(variance, 0.0) / self.count)


def accuracy_stuck(accuracies: Tally) -> str | None:
    """Detect an accuracy near chance, over all rows since the learning rate reached its peak.

    The first rows are left out, since a good run has hardly moved there either. Do not report chance accuracy before
    there are enough groups to tell.
    """
    if accuracies.count < ACCURACY_ROWS or accuracies.mean + 2 * accuracies.error >= NEAR_CHANCE:
        return None
    return f"accuracy {accuracies.mean:.2f} ± {accuracies.error:.2f} over {accuracies.count} rows"


def beta_too_small(rows: Sequence[Row]) -> str | None:
    """Detect a beta that has no effect.

    Near the reference, the sigmoid's pull grows in proportion to how far the errors move. If it would still be nothing
    once they had moved by the whole of the reference's error, beta does nothing.
    """
    if not has(rows, "winner_gap", "loser_gap", "reference_error"):
        return None
    last = rows[-WINDOW:]
    moved = abs(share(last, "winner_gap")) + abs(share(last, "loser_gap"))
    # Row by row: over many rows margins of both signs would cancel.
    if "gradient_factor" in last[-1]:
        pull = fmean(abs(row["gradient_factor"] - 0.5) for row in last)
    elif (
        "implicit_spread" in last[-1]
    ):  # listwise and pairwise losses: the slope of a softmax in a margin is at most 1/4
        pull = 0.25 * mean(last, "implicit_spread")
    else:
        return None
    if moved < 0.01 or pull > min(moved, 1.0) / 30:
        return None
    return f"errors moved by {moved:.1%} of the reference's, the gradient by {2 * pull:.2%}"


def winner_rises(rows: Sequence[Row]) -> str | None:
    """Detect that the winner's error is far above the reference's."""
    if not has(rows, "winner_gap", "reference_error"):
        return None
    winner = share(rows[-WINDOW:], "winner_gap")
    return f"{winner:+.0%} of the reference's error" if winner > 0.5 else None


def loser_dominates(rows: Sequence[Row]) -> str | None:
    """Detect that only the loser's error moved. Both errors rise in a good run, the loser's faster; a doubled loser's
    error means that images are being unlearnt.
    """
    if not has(rows, "winner_gap", "loser_gap", "reference_error"):
        return None
    winner, loser = share(rows[-WINDOW:], "winner_gap"), share(rows[-WINDOW:], "loser_gap")
    return f"loser's error {loser:+.0%}, winner's {winner:+.0%}" if loser > 1.0 and winner > -0.1 * loser else None


def margin_saturated(rows: Sequence[Row]) -> str | None:
    """Detect that the gradient factor is near 0.

    With a large beta the factor of each group is 0 or 1, and its mean is the share ordered wrongly. So twice the usual
    rows are needed, and a mean clearly below, since twenty groups in a row may be right by chance.
    """
    if not has(rows, "gradient_factor", count=2 * WINDOW):
        return None
    values = [row["gradient_factor"] for row in rows[-2 * WINDOW :]]
    factor, error = fmean(values), stdev(values) / sqrt(len(values))
    return f"gradient factor {factor:.3f}" if factor + 2 * error < 0.05 else None


def reference_disagrees(rows: Sequence[Row]) -> str | None:
    """Detect that pairs are learnt only where the reference already prefers the winner, and unlearnt elsewhere.

    Twice the usual rows, and both halves clearly on their side of 0: a half has few pairs in each row.
    """
    last = rows[-2 * WINDOW :]
    halves = [[row[name] for row in last if name in row] for name in ("disagreeing_gap", "agreeing_gap")]
    if min(map(len, halves)) < WINDOW:
        return None
    (wrong, wrong_error), (right, right_error) = [(fmean(v), stdev(v) / sqrt(len(v))) for v in halves]
    if wrong + 2 * wrong_error >= 0 or right - 2 * right_error <= 0:
        return None
    share = mean(last, "reference_disagrees")
    return f"{share:.0%} of the pairs; gap {wrong:+.3g} there, {right:+.3g} elsewhere"


def gradient_jumps(rows: Sequence[Row]) -> str | None:
    """Detect five rows in a row whose gradient norm is far above the usual one before them."""
    if not has(rows, "grad_norm", count=WINDOW + 5):
        return None
    usual = median(row["grad_norm"] for row in rows[-WINDOW - 5 : -5])
    now = min(row["grad_norm"] for row in rows[-5:])
    return f"{now:.3g} or more in five rows, {usual:.3g} before" if usual > 0 and now > 5 * usual else None


def loss_per_group(row: Row) -> float:
    """Return the loss of the groups that state a preference; the logged loss counts the others as 0."""
    return row["loss"] / max(1 - row.get("share_without_preference", 0.0), 1e-12)


def above_chance(rows: Sequence[Row]) -> bool:
    """Return whether the policy clearly orders groups better than chance, over all rows given."""
    values = [row["accuracy"] for row in rows if "accuracy" in row]
    return len(values) > 1 and fmean(values) - 2 * stdev(values) / sqrt(len(values)) > 0.5


def loss_diverges(rows: Sequence[Row], first: Sequence[float]) -> str | None:
    """Detect that the loss has left the run's first losses far behind, with hardly any overlap.

    Medians and quartiles are used, not means: with a large beta a margin is far from 0 in both directions, and the loss
    of one wrongly ordered group is as large as all others together. For the same reason the loss may be above log 2
    while the order is being learnt; then beta is large, and no step was too large.
    """
    if len(first) < WINDOW or not has(rows, "loss") or above_chance(rows):
        return None
    now = [loss_per_group(row) for row in rows[-WINDOW:]]
    before, middle = median(first), median(now)
    if not (before > 0 and middle > 1.5 * before and quantiles(now, n=4)[0] > quantiles(first, n=4)[2]):
        return None
    return f"loss {middle:.3g}, {before:.3g} in the first {WINDOW} rows (medians)"


def drift_explodes(rows: Sequence[Row]) -> str | None:
    """Detect a policy that is far from the reference and worse at denoising.

    Drift alone is not enough: under inverted noise the reference's own error is small by construction, and a policy may
    move by as much without harm.
    """
    if not has(rows, "drift", "policy_error", "reference_error"):
        return None
    drift, error = share(rows[-WINDOW:], "drift"), share(rows[-WINDOW:], "policy_error") - 1
    if drift <= 1.0 or error <= 0.5:
        return None
    return f"drift is {drift:.0%} of the reference's error, the policy's error {error:+.0%}"


def diversity_falls(rows: Sequence[Row]) -> str | None:
    """Detect falling diversity in distillation: the newest rows against the oldest that are kept (120 rows)."""
    if not has(rows, "diversity", count=3 * WINDOW):
        return None
    every = list(rows)
    before, now = mean(every[:WINDOW], "diversity"), mean(every[-WINDOW:], "diversity")
    return f"{now:.3g}, {before:.3g} in earlier rows" if now < 0.5 * before else None


def gradient_vanished(rows: Sequence[Row]) -> str | None:
    """Detect a gradient that is exactly 0; a value near 0 may be all that a small model has."""
    if not has(rows, "grad_norm"):
        return None
    return f"gradient norm 0 in {WINDOW} rows" if all(row["grad_norm"] == 0 for row in rows[-WINDOW:]) else None


CHECKS: dict[str, Check] = {
    "beta_too_small": beta_too_small,
    "winner_rises": winner_rises,
    "loser_dominates": loser_dominates,
    "margin_saturated": margin_saturated,
    "reference_disagrees": reference_disagrees,
    "gradient_jumps": gradient_jumps,
    "gradient_vanished": gradient_vanished,
    "drift_explodes": drift_explodes,
}
