"""Line charts as inline SVG: no script, no network."""

import math
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 190, 52, 26, 10

# What is worth a chart, its title, and the words under it.
CHARTS: dict[str, tuple[str, str]] = {
    "loss": ("Loss", "of a pair: log 2 = 0.693 is no preference learnt"),
    "margin": ("Margin", "inside of the log-sigmoid; above 0 the policy prefers the winner"),
    "accuracy": ("Implicit accuracy", "share of groups with a margin above 0"),
    "winner_gap": ("Winner's error against the reference", "below 0 the winner became likelier"),
    "loser_gap": ("Loser's error against the reference", "above 0 the loser became less likely"),
    "gradient_factor": ("Gradient factor", "sigmoid(-margin): near 0 nothing is learnt any more"),
    "loss_at_reference": (
        "Loss at the reference",
        "log 2 times the pairs' weights; the loss below it is what is learnt",
    ),
    "listwise": ("Listwise loss", "cross-entropy of implicit and explicit reward, summed over places"),
    "implicit_spread": ("Spread of the implicit reward", "deviation of beta d within a group; for GDRO 0.3 to 3"),
    "reward_spread": ("Spread of the labels", "deviation within a group"),
    "smoothing": ("Smoothing", "gamma (2p - 1): 1 is Diffusion-DPO"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "drift": ("Drift", "mean squared difference of policy and reference predictions"),
    "policy_error": ("Policy's error", "mean squared, on the images that are used"),
    "winner_error": ("Winner's error", "mean squared"),
    "lr": ("Learning rate", ""),
    "share_without_preference": ("Groups without preference", "their weight is 0"),
}


@dataclass(frozen=True)
class Chart:
    """A chart ready for the template."""

    title: str
    note: str
    last: str
    svg: str


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


def line_chart(name: str, steps: list[int], values: list[float]) -> Chart | None:
    """The chart of one metric; None where there is nothing finite to draw."""
    points = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
    if len(points) < 2:
        return None
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min(ys), max(ys)
    if low == high:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1

    def x(value: float) -> float:
        return LEFT + (value - xs[0]) / max(1, xs[-1] - xs[0]) * (WIDTH - LEFT - 8)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def path(series: list[float]) -> str:
        return "M" + " L".join(f"{x(s):.1f} {y(v):.1f}" for s, v in zip(xs, series, strict=True))

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">']
    for tick in ticks(low, high):
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f} H{WIDTH - 8}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y(tick) + 3.5:.1f}">{number(tick)}</text>')
    for tick in ticks(xs[0], xs[-1]):
        parts.append(f'<text class="x" x="{x(tick):.1f}" y="{HEIGHT - 8}">{number(tick)}</text>')
    parts.append(f'<path class="raw" d="{path(ys)}"/>')
    window = max(1, len(ys) // 20)
    if window > 1:
        parts.append(f'<path class="line" d="{path(smooth(ys, window))}"/>')
    # A thin invisible column over each of about 60 steps shows its value on hover.
    every = max(1, len(xs) // 60)
    width = (WIDTH - LEFT - 8) / max(1, len(xs) // every)
    for i in range(0, len(xs), every):
        parts.append(
            f'<rect class="hover" x="{x(xs[i]) - width / 2:.1f}" y="{TOP}" width="{width:.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"><title>step {xs[i]}: {number(ys[i])}</title></rect>'
        )
    title, note = CHARTS.get(name, (name, ""))
    tail = ys[-window:]
    return Chart(title, note, number(sum(tail) / len(tail)), "".join(parts) + "</svg>")
