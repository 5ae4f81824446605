"""The table and the picture of objectives.py: Markdown, JSON and an SVG without script."""

import json
import math
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from diffalign.intervals import interval_in

DENSE, EXACT, SECOND = "geneval.dense", "geneval.exact", "sharpness.sharpness"
ROW, LEFT, WIDTH, TICK = 22, 270, 780, 0.05


def change(values: dict[str, float | None] | None) -> str:
    if values is None:
        return ""
    return f"{values['difference']:+.3f} ({interval_in(values).words()})"


def name(row: dict[str, Any]) -> str:
    return row["method"] + (", shuffled labels" if row["shuffled"] else "")


def table(rows: list[dict[str, Any]]) -> str:
    """Differences from the base with 95 % intervals over prompts."""
    lines = []
    for base in dict.fromkeys(row["base"] for row in rows):
        own = [row for row in rows if row["base"] == base]
        score = own[0][f"held_out {DENSE}"]["base"]
        second = "second reward | " if f"held_out {SECOND}" in own[0] else ""
        lines += [
            f"### {base} (dense {score:.3f}, diversity {own[0]['base_diversity']:.3f} before)\n",
            "| method | dense, held out | exact, held out | dense, unseen kinds | true against shuffled | drift | "
            f"diversity | {second}steps | CPU s/step |",
            "|---|---|---|---|---|---|---|---|---|" + ("---|" if second else ""),
        ]
        for row in own:
            drift = "" if row["drift"] is None else f"{row['drift']:.2g}"
            lines.append(
                f"| {name(row)} | {change(row[f'held_out {DENSE}'])} | {change(row[f'held_out {EXACT}'])} | "
                f"{change(row.get(f'out_of_distribution {DENSE}'))} | {change(row.get('against shuffled'))} | {drift} | "
                f"{row['diversity']:.3f} | {change(row[f'held_out {SECOND}']) + ' | ' if second else ''}{row['steps']:.0f} | "
                f"{row['cpu_seconds_per_step']:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def picture(rows: list[dict[str, Any]]) -> str:
    """A dot and its interval for every row: difference of the held-out dense score from the base."""
    found = [row[f"held_out {DENSE}"] for row in rows]
    intervals = [interval_in(v) for v in found]
    ends = [end for one in intervals for end in (one.low, one.high) if end is not None]
    ends += [0.0, *(v["difference"] for v in found)]
    low, high = min(ends), max(ends)
    room = (high - low) * 0.05 or 0.01
    low, high = low - room, high + room
    height = ROW * (len(rows) + 2)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - 20) * (value - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="14">change of the dense score on held-out prompts, 95 % intervals</text>',
    ]
    for step in range(math.ceil(low / TICK), math.floor(high / TICK) + 1):
        place = x(step * TICK)
        parts += [
            f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{ROW}" y2="{height - ROW}" stroke="{"#ddd" if step else "#888"}"/>',
            f'<text x="{place:.1f}" y="{height - 6}" text-anchor="middle">{step * TICK:+.2f}</text>',
        ]
    for i, (row, value) in enumerate(zip(rows, found, strict=True)):
        y = ROW * (i + 1.5)
        color = "#999999" if row["shuffled"] else "#1f5fa8"
        label = escape(f"{name(row)} ({row['base'].removeprefix('shapes-')})")
        parts += [
            f'<text x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{label}</text>',
            *(
                f'<line x1="{x(interval.low):.1f}" x2="{x(interval.high):.1f}" y1="{y:.1f}" y2="{y:.1f}" '
                f'stroke="{color}" stroke-width="2"/>'
                for interval in [interval_in(value)]
                if interval.low is not None and interval.high is not None
            ),
            f'<circle cx="{x(value["difference"]):.1f}" cy="{y:.1f}" r="4" fill="{color}"/>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def write_report(rows: list[dict[str, Any]], folder: Path, size: dict[str, Any], stem: str = "objectives") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = table(rows)
    print(f"\n{text}")
    (folder / f"{stem}.md").write_text(text)
    (folder / f"{stem}.svg").write_text(picture(rows))
    (folder / f"{stem}.json").write_text(json.dumps({"size": size, "rows": rows}, indent=1) + "\n")
    print(f"written: {folder}/{stem}.md, .svg, .json")
