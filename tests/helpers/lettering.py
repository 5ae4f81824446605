"""Rendered text for the OCR reward: fonts, sizes and grounds drawn at random, none left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WORDS = [
    "OPEN", "Hello World", "Coffee Shop", "Route 66", "HAPPY BIRTHDAY", "Fresh Bread", "Exit", "Do Not Enter",
    "Welcome Home", "SALE 50", "Good Morning", "Library", "Stop", "Wet Paint", "Jazz Night", "Gate 12",
    "Pizza", "Beware of Dog", "Taxi", "Summer 2026",
]  # fmt: skip
SIDES, SIZES = (256, 512, 1024), (20, 24, 28, 32, 40, 56)
GROUNDS = ("plain", "noise", "gradient", "waves")


def families() -> list[Path | None]:
    """Pillow's own font (None), and whatever of these the machine has: no font is needed."""
    roots = [Path("/usr/share/fonts/truetype") / part for part in (
        "dejavu/DejaVuSans-Bold.ttf", "dejavu/DejaVuSerif.ttf", "liberation/LiberationSans-Regular.ttf",
        "liberation/LiberationMono-Bold.ttf",
    )]  # fmt: skip
    return [None, *(path for path in roots if path.is_file())]


def _font(family: Path | None, size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(str(family), size) if family else ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _ground(kind: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """[side, side, 3] in 0 to 255."""
    colour = rng.integers(0, 256, 3).astype(np.float64)
    y, x = np.mgrid[0:side, 0:side][..., None] / side
    change = {
        "plain": 0.0,
        "noise": rng.normal(0, 12, (side, side, 3)),
        "gradient": rng.uniform(-50, 50, 3) * (2 * x - 1) + rng.uniform(-50, 50, 3) * (2 * y - 1),
        "waves": rng.uniform(15, 40, 3) * np.sin(rng.uniform(5, 25, 3) * x + rng.uniform(5, 25, 3) * y),
    }[kind]
    return np.clip(np.broadcast_to(colour + change, (side, side, 3)), 0, 255)


def rendered(count: int) -> list[tuple[str, Image.Image]]:
    """`count` pictures with their text, black or white by the mean of the ground; too wide a text is drawn smaller."""
    rng = np.random.default_rng(0)
    pictures = []
    for i in range(count):
        text, side = WORDS[i % len(WORDS)], int(rng.choice(SIDES))
        family, size = families()[rng.integers(len(families()))], int(rng.choice(SIZES))
        pixels = _ground(str(rng.choice(GROUNDS)), side, rng)
        image = Image.fromarray(pixels.astype(np.uint8))
        draw = ImageDraw.Draw(image)
        while (width := draw.textlength(text, font=_font(family, size))) > 0.95 * side:
            size -= 1
        ink = (0, 0, 0) if pixels.mean((0, 1)) @ [0.3, 0.59, 0.11] > 128 else (255, 255, 255)
        place = ((side - width) * rng.uniform(0.05, 0.95), side * rng.uniform(0.05, 0.75))
        draw.text(place, text, font=_font(family, size), fill=ink)
        pictures.append((text, image))
    return pictures
