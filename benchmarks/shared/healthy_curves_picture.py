"""The picture of docs/healthy-curves.md: a row of panels for a good run and for each way to break it."""

from typing import Any

from diffalign.report.curves import HEIGHT, WIDTH, Series, series, static_svg

Rows = list[dict[str, Any]]

DRAWN = {
    "dpo-sdxl-0": "good (Diffusion-DPO, beta 2000, learning rate 0.0005)",
    "beta-small-sdxl": "beta too small (1 instead of 2000)",
    "reversed-sdxl": "labels reversed",
    "shuffled-sdxl": "labels shuffled",
    "lr-high-sdxl": "learning rate too high (0.03 instead of 0.0005)",
}
PANELS = {
    "accuracy": "implicit accuracy",
    "gaps": "error against the reference: winner (blue), loser (orange)",
    "gradient_factor": "gradient factor",
    "drift": "drift",
}
STYLE = """
.grid { stroke: #8884; stroke-width: 1 } .raw { fill: none; stroke-width: 1; opacity: .3 }
.line { fill: none; stroke-width: 2 } text { font: 11px system-ui, sans-serif; fill: #808080 }
.y { text-anchor: end } .x { text-anchor: middle } .title { font-size: 15px; font-weight: 600 } .name { font-size: 12px }
.run0 { stroke: #4a86e8 } .run1 { stroke: #e07a2f }
"""


def lines_of(rows: Rows, panel: str) -> list[Series]:
    names = ["winner_gap", "loser_gap"] if panel == "gaps" else [panel]
    return [s for n, name in enumerate(names) for s in [series(n, name, rows)] if s is not None]


def picture(runs: dict[str, Rows]) -> str:
    """A row of panels for each run in DRAWN; every panel has its own scale."""
    row = HEIGHT + 62
    width, height = WIDTH * len(PANELS), row * len(DRAWN)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"><style>{STYLE}</style>']
    for i, (name, title) in enumerate(DRAWN.items()):
        parts.append(f'<text class="title" x="52" y="{i * row + 22}">{title}</text>')
        for j, (panel, what) in enumerate(PANELS.items()):
            parts.append(f'<text class="name" x="{j * WIDTH + 52}" y="{i * row + 42}">{what}</text>')
            place = f'<svg x="{j * WIDTH}" y="{i * row + 44}" width="{WIDTH}" height="{HEIGHT}" '
            parts.append(static_svg(panel, lines_of(runs[name], panel)).replace("<svg ", place, 1))
    return "\n".join([*parts, "</svg>"]) + "\n"
