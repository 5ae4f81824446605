"""Images and prompts for learnt rewards."""

from __future__ import annotations

from helpers import pictures

PROMPTS = ["a red cat", "two dogs and a very long story " * 12, "a red cat", ""]


SHAPES = [(96, 64), (300, 500), (224, 224), (513, 259)]


IMAGES = [pictures.smooth(i, *size) for i, size in enumerate(SHAPES)]
