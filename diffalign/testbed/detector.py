"""Read coloured shapes back from pixels: colour segmentation, connected components, template matching.

It is classical on purpose: it has no weights, it is exact on clean scenes, and its confidence falls smoothly when a
generated shape is malformed. So it can replace GenEval's Mask2Former and CLIP.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from diffalign.rewards.detection import Detection
from diffalign.testbed.scenes import COLORS, GROUND, SHAPES, PlacedShape, draw_shape

_PALETTE = np.array([GROUND, *COLORS.values()], dtype=np.float32)
_TEMPLATE_SIDE = 24


@cache
def template(shape: str) -> np.ndarray:
    """Return the coverage of a shape over its bounding box, [24, 24] in [0, 1]."""
    scale = 8
    side = _TEMPLATE_SIDE * scale
    canvas = Image.new("L", (side, side), 0)
    half = _TEMPLATE_SIDE / 2
    draw_shape(ImageDraw.Draw(canvas), PlacedShape(shape, "", half, half, half), (255,), (0,), scale)
    return np.asarray(canvas.resize((_TEMPLATE_SIDE, _TEMPLATE_SIDE), Image.Resampling.BOX), dtype=np.float32) / 255


@dataclass(frozen=True)
class ShapeDetector:
    """A `diffalign.rewards.detection.Detector` for the world of shapes.

    min_area: components with fewer pixels are noise. floor, ceiling: overlap with the best template that maps to
    confidence 0 and 1.
    """

    min_area: int = 24
    floor: float = 0.55
    ceiling: float = 0.80

    labels: tuple[str, ...] = SHAPES
    colors: tuple[str, ...] = tuple(COLORS)

    def detect(self, images: list[Image.Image]) -> list[list[Detection]]:
        """Return the objects in each image, most confident first. Boxes are (x1, y1, x2, y2) in pixels of the image."""
        return [self._detect(np.asarray(image.convert("RGB"), dtype=np.float32)) for image in images]

    def _detect(self, pixels: np.ndarray) -> list[Detection]:
        from scipy import ndimage

        distance = ((pixels[:, :, None, :] - _PALETTE) ** 2).sum(-1)
        nearest = distance.argmin(-1)
        found = []
        for index, color in enumerate(COLORS, start=1):
            # The opening drops the one-pixel rims where an edge blends into the ground and looks like a third colour.
            mask = ndimage.binary_opening(nearest == index, structure=np.ones((2, 2)))
            components, count = ndimage.label(mask)
            # Share of each pixel that is object, along the line from the ground to the component's colour.
            axis = _PALETTE[index] - _PALETTE[0]
            coverage = np.clip(((pixels - _PALETTE[0]) @ axis) / (axis @ axis), 0, 1)
            for k in range(1, count + 1):
                component = components == k
                if component.sum() >= self.min_area:
                    found.append(self._classify(component, coverage, color))
        return sorted(found, key=lambda d: -d.score)

    def _classify(self, component: np.ndarray, coverage: np.ndarray, color: str) -> Detection:
        from scipy import ndimage

        reach = ndimage.binary_dilation(component, structure=np.ones((3, 3)))
        soft = coverage * reach
        ys, xs = np.nonzero(soft > 0.5)
        # Sub-pixel bounding box: the outermost half-covered pixels, moved outwards by their neighbours' coverage.
        x1, x2, y1, y2 = _extent(soft, axis=0, low=xs.min(), high=xs.max()) + _extent(
            soft, axis=1, low=ys.min(), high=ys.max()
        )
        grid = (np.arange(_TEMPLATE_SIDE) + 0.5) / _TEMPLATE_SIDE
        sample_y, sample_x = np.meshgrid(y1 + grid * (y2 - y1) - 0.5, x1 + grid * (x2 - x1) - 0.5, indexing="ij")
        patch = ndimage.map_coordinates(soft, [sample_y, sample_x], order=1, mode="constant")
        overlap = {s: _soft_iou(patch, template(s)) for s in SHAPES}
        shape = max(overlap, key=lambda s: overlap[s])
        aspect = min(x2 - x1, y2 - y1) / max(x2 - x1, y2 - y1)
        confidence = (overlap[shape] * min(1.0, aspect / 0.75) - self.floor) / (self.ceiling - self.floor)
        return Detection(shape, (x1, y1, x2, y2), float(np.clip(confidence, 0.0, 1.0)), color)


def _extent(soft: np.ndarray, axis: int, low: int, high: int) -> tuple[float, float]:
    profile = soft.max(axis=axis)
    before = profile[low - 1] if low > 0 else 0.0
    after = profile[high + 1] if high + 1 < len(profile) else 0.0
    return float(low - before + (1 - profile[low])), float(high + 1 + after - (1 - profile[high]))


def _soft_iou(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())
