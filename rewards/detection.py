"""Define what a reward needs of an object detector, so that any detector can be used."""

from dataclasses import dataclass
from typing import Protocol

from PIL import Image


@dataclass(frozen=True)
class Detection:
    """One detected object.

    box: (x1, y1, x2, y2) in pixels of the image. score: confidence in [0, 1]. color: the name of its colour, None if
    the detector does not name colours.
    """

    label: str
    box: tuple[float, float, float, float]
    score: float
    color: str | None = None


class Detector(Protocol):
    """Finds objects and, if it can, names their colours."""

    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def colors(self) -> tuple[str, ...]: ...

    def detect(self, images: list[Image.Image]) -> list[list[Detection]]:
        """Return the objects of each image, all classes together, in any order."""
        ...
