"""Checks of the newest logged rows. Each takes rows (oldest first) and says what it measured, or None if all is well.

Thresholds were chosen on short runs of the embedded world, good ones and deliberately broken ones
(`docs/healthy-curves.md`); errors are judged as shares of the reference's, which is what carries over to other models.
"""

from collections.abc import Callable, Sequence
from math import isfinite, sqrt
from statistics import fmean, median, stdev

Row = dict[str, float]
Check = Callable[[Sequence[Row]], str | None]

WINDOW = 20
"""Single steps only flicker: what is judged is the mean of this many logged rows."""


def mean(rows: Sequence[Row], name: str) -> float:
    values = [row[name] for row in rows if isfinite(row[name])]
    return fmean(values) if values else float("nan")


def has(rows: Sequence[Row], *names: str, count: int = WINDOW) -> bool:
    """Whether there are enough rows, with these metrics in them."""
    return len(rows) >= count and all(name in rows[-1] for name in names)


def no_spread(rows: Sequence[Row]) -> str | None:
    if not has(rows, "share_without_preference"):
        return None
    share = mean(list(rows)[-WINDOW:], "share_without_preference")
    return f"{share:.0%} of the groups" if share > 0.5 else None


def accuracy_stuck(rows: Sequence[Row]) -> str | None:
    """Judged late: in its first hundred steps a good run, too, is hardly above a coin."""
    count = 120
    if not has(rows, "accuracy", count=count):
        return None
    values = [row["accuracy"] for row in rows[-80:]]
    middle, error = fmean(values), stdev(values) / sqrt(len(values))
    return f"accuracy {middle:.2f} ± {error:.2f} over {len(values)} rows" if middle < 0.5 + 2 * error else None


def beta_too_small(rows: Sequence[Row]) -> str | None:
    if not has(rows, "gradient_factor", "winner_gap", "loser_gap", "reference_error"):
        return None
    last = rows[-WINDOW:]
    reference = mean(last, "reference_error")
    moved = (abs(mean(last, "winner_gap")) + abs(mean(last, "loser_gap"))) / reference if reference else 0.0
    # Step by step: over many steps margins of both signs would cancel.
    pull = fmean(abs(row["gradient_factor"] - 0.5) for row in last)
    if moved < 0.03 or pull > 0.001:
        return None
    return f"errors moved by {moved:.1%} of the reference's, gradient factor within {pull:.4f} of 0.5"


def winner_rises(rows: Sequence[Row]) -> str | None:
    if not has(rows, "winner_gap", "reference_error"):
        return None
    last = rows[-WINDOW:]
    share = mean(last, "winner_gap") / max(mean(last, "reference_error"), 1e-12)
    return f"{share:+.0%} of the reference's error" if share > 0.5 else None


def loser_dominates(rows: Sequence[Row]) -> str | None:
    if not has(rows, "winner_gap", "loser_gap", "reference_error"):
        return None
    last = rows[-WINDOW:]
    reference = max(mean(last, "reference_error"), 1e-12)
    winner, loser = mean(last, "winner_gap") / reference, mean(last, "loser_gap") / reference
    return f"loser's error {loser:+.0%}, winner's {winner:+.0%}" if loser > 0.5 and winner > -0.1 * loser else None


def margin_saturated(rows: Sequence[Row]) -> str | None:
    if not has(rows, "gradient_factor"):
        return None
    factor = mean(rows[-WINDOW:], "gradient_factor")
    return f"gradient factor {factor:.3f}" if factor < 0.05 else None


def gradient_jumps(rows: Sequence[Row]) -> str | None:
    """Five rows in a row against the ordinary size before them."""
    if not has(rows, "grad_norm", count=WINDOW + 5):
        return None
    usual = median(row["grad_norm"] for row in rows[-WINDOW - 5 : -5])
    now = min(row["grad_norm"] for row in rows[-5:])
    return f"{now:.3g} or more in five rows, {usual:.3g} before" if usual > 0 and now > 5 * usual else None


def loss_diverges(rows: Sequence[Row], first: float | None = None) -> str | None:
    """Against the mean of the run's first rows (`first`)."""
    if first is None or not has(rows, "loss", count=WINDOW):
        return None
    now = mean(rows[-WINDOW:], "loss")
    return f"loss {now:.3g}, {first:.3g} in the first {WINDOW} rows" if first > 0 and now > 1.5 * first else None


def drift_explodes(rows: Sequence[Row]) -> str | None:
    if not has(rows, "drift", "reference_error"):
        return None
    last = rows[-WINDOW:]
    share = mean(last, "drift") / max(mean(last, "reference_error"), 1e-12)
    return f"drift is {share:.0%} of the reference's error" if share > 1.0 else None


def diversity_falls(rows: Sequence[Row]) -> str | None:
    """Distillation: the newest rows against the oldest that are kept (120 rows)."""
    if not has(rows, "diversity", count=3 * WINDOW):
        return None
    before, now = mean(rows[:WINDOW], "diversity"), mean(rows[-WINDOW:], "diversity")
    return f"{now:.3g}, {before:.3g} in earlier rows" if now < 0.5 * before else None


CHECKS: dict[str, Check] = {
    "accuracy_stuck": accuracy_stuck,
    "beta_too_small": beta_too_small,
    "winner_rises": winner_rises,
    "loser_dominates": loser_dominates,
    "margin_saturated": margin_saturated,
    "gradient_jumps": gradient_jumps,
    "drift_explodes": drift_explodes,
    "diversity_falls": diversity_falls,
}
