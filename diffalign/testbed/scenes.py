"""Define scenes of coloured shapes on a plain ground, and draw them.

A scene is the ground truth: a list of objects with shape, colour, centre and radius in pixels. `render` draws it at
four times the size and shrinks it, so edges are smooth as in a photograph.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
GROUND = (236, 236, 232)
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "star", "ring")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "yellow": (242, 200, 30),
    "green": (40, 150, 60),
    "blue": (40, 90, 215),
    "purple": (140, 60, 180),
    "pink": (250, 140, 200),
    "black": (30, 30, 34),
}
MIN_RADIUS, MAX_RADIUS, GAP = 7.0, 11.0, 3.0
_OVERSAMPLING = 4


@dataclass(frozen=True)
class PlacedShape:
    """One object: `x` and `y` are its centre, `radius` half the side of its bounding box, all in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


Scene = tuple[PlacedShape, ...]


def outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Return the polygon of a straight-edged shape with bounding box [x - r, x + r] x [y - r, y + r]."""
    if shape == "square":
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "cross":
        a = r / 3
        return [(x - a, y - r), (x + a, y - r), (x + a, y - a), (x + r, y - a), (x + r, y + a), (x + a, y + a),
                (x + a, y + r), (x - a, y + r), (x - a, y + a), (x - r, y + a), (x - r, y - a), (x - a, y - a)]  # fmt: skip
    points = [
        (
            math.sin(k * math.pi / 5) * (1.0 if k % 2 == 0 else 0.42),
            -math.cos(k * math.pi / 5) * (1.0 if k % 2 == 0 else 0.42),
        )
        for k in range(10)
    ]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    # A regular star is neither as wide nor as tall as its circle: stretch it to the common bounding box.
    return [
        (x - r + 2 * r * (px - min(xs)) / (max(xs) - min(xs)), y - r + 2 * r * (py - min(ys)) / (max(ys) - min(ys)))
        for px, py in points
    ]


def draw_shape(
    draw: ImageDraw.ImageDraw, item: PlacedShape, fill: tuple[int, ...], ground: tuple[int, ...], scale: int
) -> None:
    """Draw one object on a canvas `scale` times the scene."""
    x, y, r = item.x * scale, item.y * scale, item.radius * scale
    if item.shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        if item.shape == "ring":
            hole = 0.5 * r
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=ground)
    else:
        draw.polygon(outline(item.shape, x, y, r), fill=fill)


def render(scene: Scene) -> Image.Image:
    """Return the scene as an RGB image, 64 x 64."""
    canvas = Image.new("RGB", (SIZE * _OVERSAMPLING, SIZE * _OVERSAMPLING), GROUND)
    draw = ImageDraw.Draw(canvas)
    for item in scene:
        draw_shape(draw, item, COLORS[item.color], GROUND, _OVERSAMPLING)
    return canvas.resize((SIZE, SIZE), Image.Resampling.BOX)


def is_apart_from(item: PlacedShape, others: list[PlacedShape]) -> bool:
    """Return whether `item` keeps its distance from the others' bounding boxes."""
    return all(
        max(abs(item.x - other.x), abs(item.y - other.y)) >= item.radius + other.radius + GAP for other in others
    )


def place(kinds: list[tuple[str, str]], rng: np.random.Generator, relation: str | None = None) -> Scene:
    """Put (shape, colour) pairs at random free places.

    With a `relation` ("left of", "right of", "above", "below") the second object stands so to the first, clearly enough
    for GenEval's rule (components of the shrunk, normalised offset of centres above 0.5).
    """
    dx, dy = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}.get(relation or "", (0, 0))
    while True:
        placed: list[PlacedShape] = []
        for shape, color in kinds:
            radius = rng.uniform(MIN_RADIUS, MAX_RADIUS)
            for _ in range(40):
                x, y = rng.uniform(radius + 2, SIZE - radius - 2, size=2)
                item = PlacedShape(shape, color, float(x), float(y), float(radius))
                if not is_apart_from(item, placed):
                    continue
                if relation and placed:
                    ox, oy = item.x - placed[0].x, item.y - placed[0].y
                    along, across = ox * dx + oy * dy, abs(ox * dy) + abs(oy * dx)
                    if along < 1.5 * across:
                        continue
                placed.append(item)
                break
            else:
                break
        if len(placed) == len(kinds):
            return tuple(placed)
