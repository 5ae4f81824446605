"""Rendered text for the OCR reward: several fonts, sizes and grounds."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WORDS = [
    "OPEN", "Hello World", "Coffee Shop", "Route 66", "HAPPY BIRTHDAY", "Fresh Bread", "Exit", "Do Not Enter",
    "Welcome Home", "SALE 50", "Good Morning", "Library", "Stop", "Wet Paint", "Jazz Night", "Gate 12",
    "Pizza", "Beware of Dog", "Taxi", "Summer 2026",
]  # fmt: skip


def fonts() -> list[ImageFont.FreeTypeFont]:
    """Pillow's own font at two sizes, and whatever of these the machine has: no font is needed."""
    found = [font for size in (24, 32) if isinstance(font := ImageFont.load_default(size), ImageFont.FreeTypeFont)]
    roots = [Path("/usr/share/fonts/truetype") / part for part in (
        "dejavu/DejaVuSans-Bold.ttf", "dejavu/DejaVuSerif.ttf", "liberation/LiberationSans-Regular.ttf",
        "liberation/LiberationMono-Bold.ttf",
    )]  # fmt: skip
    return found + [ImageFont.truetype(str(path), 28) for path in roots if path.is_file()]


def rendered(count: int) -> list[tuple[str, Image.Image]]:
    """`count` pictures with their text: 256 and 512 px, plain or noisy grounds of many colours."""
    rng = np.random.default_rng(0)
    styles = itertools.cycle(itertools.product((256, 512), (False, True)))
    pictures = []
    for i, (side, noisy) in zip(range(count), styles, strict=False):
        text, font = WORDS[i % len(WORDS)], fonts()[i % len(fonts())]
        ground = rng.integers(0, 256, 3)
        pixels = np.broadcast_to(ground, (side, side, 3)).astype(np.float64)
        if noisy:
            pixels = pixels + rng.normal(0, 12, pixels.shape)
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        ink = (0, 0, 0) if ground @ [0.3, 0.59, 0.11] > 128 else (255, 255, 255)
        draw = ImageDraw.Draw(image)
        width = draw.textlength(text, font=font)
        draw.text(((side - width) * rng.uniform(0.2, 0.8), side * rng.uniform(0.2, 0.7)), text, font=font, fill=ink)
        pictures.append((text, image))
    return pictures
