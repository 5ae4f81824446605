"""The two rewards of the pixels alone beside their definitions: the size of a file on the disk, OpenCV's Laplacian."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.rewards import load_reward
from helpers import pictures

SHAPES = [(8, 8), (64, 48), (33, 97), (256, 256), (512, 300), (31, 400)]
PICTURES = [pictures.smooth(seed, *size) for seed, size in enumerate(SHAPES * 3)]
NOISE = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 80, 3), dtype=np.uint8)) for seed in range(4)
]
FLAT = [Image.new("RGB", (40, 40), (value, value, value)) for value in (0, 128, 255)]


@pytest.mark.parametrize(
    ("options", "quality", "sign"), [({}, 95, -1), ({"quality": 50}, 50, -1), ({"sign": -1}, 95, 1)]
)
def test_jpeg_compressibility(tmp_path: Path, options: dict[str, int], quality: int, sign: int) -> None:
    """DDPO's reward (jpeg_compressibility of its rewards.py): minus the kilobytes of a JPEG of quality 95."""
    images = [*PICTURES, *NOISE, *FLAT]
    wanted = []
    for n, image in enumerate(images):
        image.save(tmp_path / f"{n}.jpg", quality=quality)
        wanted.append(sign * (tmp_path / f"{n}.jpg").stat().st_size / 1000)
    found = load_reward("jpeg_compressibility", **options).score(images, [""] * len(images))
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)
    assert len(set(wanted)) > 20


def test_sharpness() -> None:
    images = [*PICTURES, *NOISE, *FLAT]
    wanted = []
    for image in images:
        grey = np.asarray(image, dtype=np.float64) @ [0.299, 0.587, 0.114] / 255
        wanted.append(np.log10(1e-4 + cv2.Laplacian(grey, cv2.CV_64F, ksize=1)[1:-1, 1:-1].var()))
    reward = load_reward("sharpness")
    found = reward.score(images, [""] * len(images))
    assert found.tolist() == pytest.approx(wanted, abs=1e-5)
    assert found[-3:].tolist() == pytest.approx([-4.0] * 3) and max(wanted) - min(wanted) > 3
    # The path with a gradient is the same.
    for image, value in zip(images[:4], found, strict=False):
        pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float() / 255
        assert reward.score_tensors(pixels, [""]).item() == pytest.approx(value.item(), abs=1e-5)
