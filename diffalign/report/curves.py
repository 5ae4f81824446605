"""Line charts: the series that the page draws, and the same as static SVG for where scripts do not run."""

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from diffalign.errors import DiffalignError
from diffalign.objectives import OBJECTIVES, Charts, Objective, find_objective

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 190, 52, 26, 10
POINTS = 1500
"""A longer series is averaged into so many points: a screen shows no more."""

# Title and note of every metric that gets a chart, in the order of the page. Objectives state the titles of their own metrics,
# which stand between the two tables.
FIRST: dict[str, tuple[str, str]] = {
    "validation": ("Validation reward", "mean over prompts that are not trained on; step 0 is the untrained model"),
    "loss": (
        "Loss",
        "of a pair in dpo, log 2 = 0.693 is no preference learnt (times the share of groups that state one); of a reward's "
        "gradient, minus the weighted rewards, plus the drift's penalty",
    ),
}
LAST: dict[str, tuple[str, str]] = {
    "student_loss": ("Student's loss", "half the squared step; its size says little, its jumps do"),
    "fake_loss": ("Fake network's error", "mean squared, on the student's images"),
    "reward": ("Reward in training", "mean over the images that are judged; of several rewards, by their weights"),
    "unscored": (
        "Images without a score",
        "share of the drawn images that a reward could not score; they are left out",
    ),
    "above_threshold": ("Above the threshold", "share of scores that are good enough and pull no more"),
    "diversity": ("Diversity within a prompt", "deviation over the latents of one prompt's images; should not halve"),
    "r_dm": ("R_dm", "log p_teacher / p_student of the student's images from one draw, nats; 0 where both agree"),
    "dm": ("Matching term", "mean size of teacher less fake; 0 where they agree"),
    "ca": ("Guidance term", "mean size of what guidance adds"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "drift": ("Drift", "mean squared difference of policy and reference predictions"),
    "drift_excess": ("Drift beyond the bound", "what drift exceeds train.drift_radius by"),
    "reference_disagrees": (
        "Reference prefers the loser",
        "share of pairs whose loser has the reference's lower error",
    ),
    "disagreeing_gap": (
        "Learnt where the reference disagrees",
        "error difference of the loser less that of the winner, over those pairs; should rise above 0",
    ),
    "agreeing_gap": ("Learnt where the reference agrees", "the same over the other pairs"),
    "disagreeing_turned": ("Order turned", "share of the pairs that the reference has wrong and the policy right"),
    "agreeing_lost": ("Order lost", "share of the pairs that the reference has right and the policy wrong"),
    "policy_error": ("Policy's error", "mean squared, on the images that are used"),
    "beta": ("Beta", "as train.auto_beta or objective.beta_end sets it"),
    "lr": ("Learning rate", ""),
    "share_without_preference": ("Groups without preference", "their weight is 0"),
}


def titles(objectives: Iterable[str]) -> Charts:
    """Return title and note of every metric that gets a chart, from the names of the runs' objectives.

    Where two objectives share a metric, the first one named decides; ours follow after those named.
    """
    named: list[type[Objective]] = []
    for name in objectives:
        # The package of a run's objective may be gone by now: its own metrics then have no chart.
        with suppress(DiffalignError):
            named.append(find_objective(name))
    found = dict(FIRST)
    for kind in (*named, *OBJECTIVES.values()):
        found |= {metric: text for metric, text in kind.charts.items() if metric not in found and metric not in LAST}
    return found | LAST


@dataclass(frozen=True)
class Series:
    """One run's values; `run` is its place among the runs, which decides its colour."""

    run: int
    steps: list[float]
    values: list[float]


def series(run: int, name: str, rows: list[dict[str, float]]) -> Series | None:
    """Return the finite values of a metric; None where there are fewer than two."""
    points = [(float(r["step"]), float(r[name])) for r in rows if name in r and math.isfinite(r[name])]
    if len(points) < 2:
        return None
    size = math.ceil(len(points) / POINTS)
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    means = [[sum(column) / len(chunk) for column in zip(*chunk, strict=True)] for chunk in chunks]
    return Series(run, [m[0] for m in means], [m[1] for m in means])


def smooth(values: list[float], window: int) -> list[float]:
    """Centred moving average."""
    half = window // 2
    return [sum(part) / len(part) for i in range(len(values)) for part in [values[max(0, i - half) : i + half + 1]]]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between low and high."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first = math.ceil(low / step)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Short and readable: 0.693, 1.2e-05, 400."""
    if value == 0:
        return "0"
    return f"{value:.1e}" if abs(value) < 1e-3 or abs(value) >= 1e5 else f"{value:.4g}"


def static_svg(name: str, lines: list[Series]) -> str:
    """Return the chart without a script: raw lines and their moving averages."""
    xs, ys = [s for line in lines for s in line.steps], [v for line in lines for v in line.values]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    if low == high:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1

    def x(value: float) -> float:
        return LEFT + (value - left) / ((right - left) or 1) * (WIDTH - LEFT - 8)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def path(steps: list[float], values: list[float]) -> str:
        return "M" + " L".join(f"{x(s):.1f} {y(v):.1f}" for s, v in zip(steps, values, strict=True))

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">']
    for tick in ticks(low, high):
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f} H{WIDTH - 8}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y(tick) + 3.5:.1f}">{number(tick)}</text>')
    for tick in ticks(left, right):
        parts.append(f'<text class="x" x="{x(tick):.1f}" y="{HEIGHT - 8}">{number(tick)}</text>')
    for line in lines:
        window = max(1, len(line.values) // 20)
        if window > 1:
            parts.append(f'<path class="raw run{line.run % 8}" d="{path(line.steps, line.values)}"/>')
        parts.append(f'<path class="line run{line.run % 8}" d="{path(line.steps, smooth(line.values, window))}"/>')
    return "".join(parts) + "</svg>"
