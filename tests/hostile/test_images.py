"""Pictures that are made to cost much: bounded memory, one row each, and the same pixels as before."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

from diffalign.files.images import Unreadable, decode, read_file
from diffalign.rewards import load_reward, pixel_rewards
from diffalign.scoring import batches as scoring
from diffalign.scoring.sources import Prompting
from diffalign.stages.score import ScoreRequest, score
from helpers import pictures
from helpers.counting_reward import run as count


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(mode: str, size: tuple[int, int] = (90, 700), seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, size[::-1], dtype=np.uint16))
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = rng.integers(0, 256, (*size[::-1], bands), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if bands == 1 else values, "L" if mode in ("P", "1") else mode).convert(mode)


def whole(data: bytes) -> Image.Image:
    """Decode at once, without strips: the oracle, in numpy where pixels are blended."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.float64) / 257 + 0.5, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image.convert("RGBA")).convert(
        "RGB"
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P", "I;16"])
@pytest.mark.parametrize("turn", [None, 1, 3, 6, 8])
def test_strips_change_no_pixel(mode: str, turn: int | None) -> None:
    exif = Image.Exif()
    if turn:
        exif[0x0112] = turn
    data = encoded(noise(mode), "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode(data)), np.asarray(whole(data)))


def test_a_transparent_colour_and_a_palette_with_alpha() -> None:
    for mode, transparency in (("RGB", (1, 2, 3)), ("L", 7), ("P", 5), ("P", bytes(range(256)))):
        data = encoded(noise(mode), "PNG", transparency=transparency)
        assert np.array_equal(np.asarray(decode(data)), np.asarray(whole(data))), (mode, transparency)


def test_only_the_first_frame_is_decoded() -> None:
    frames = [Image.new("RGB", (64, 64), (n, 0, 0)) for n in range(30)]
    for form, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("MPO", {})):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert decode(data).size == (64, 64)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("size", [900_000, 1_100_000, 3_000_000])
def test_large_texts_in_a_png(packed: bool, size: int) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * size, zip=packed)
    assert decode(encoded(Image.new("RGB", (8, 8)), "PNG", pnginfo=info)).size == (8, 8)


def test_a_colour_profile_that_grows() -> None:
    assert decode(encoded(Image.new("RGB", (8, 8)), "PNG", icc_profile=b"x" * 30_000_000)).size == (8, 8)


def test_a_large_exif_and_odd_integers() -> None:
    exif = Image.Exif()
    exif[0x9286] = b"x" * 60_000
    assert decode(encoded(Image.new("RGB", (8, 8)), "JPEG", exif=exif)).size == (8, 8)
    with pytest.raises(Unreadable, match="32-bit integer"):
        decode(encoded(Image.fromarray(np.full((8, 8), 2**20, dtype=np.int32)), "TIFF"))
    with pytest.raises(Unreadable, match="floating-point"):
        decode(encoded(Image.fromarray(np.ones((8, 8), dtype=np.float32)), "TIFF"))


def test_a_sparse_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(Unreadable, match="more than"):
        read_file(tmp_path / "a.png")
    with pytest.raises(Unreadable):
        read_file(tmp_path / "a\0.png")
    pictures.smooth(1).save(tmp_path / "b.png")
    assert score(ScoreRequest([str(tmp_path)], ["sharpness"], output=tmp_path / "o.jsonl")) == 3
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["sharpness"] is None for row in rows] == [True, False]


def test_memory_of_the_largest_picture(tmp_path: Path) -> None:
    """A file of 12 kB that holds nearly 100 million pixels takes little more than its pixels."""
    program = """
import io, resource
from PIL import Image
from diffalign.files.images import decode
Image.MAX_IMAGE_PIXELS = None
buffer = io.BytesIO()
Image.new("1", (9999, 10000)).save(buffer, "PNG")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert decode(buffer.getvalue()).size == (9999, 10000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 700


def test_pictures_that_are_read_ahead_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(12):
        noise("RGB", (40, 40), n).save(tmp_path / f"{n:02d}.png")
    expected, at_once = count([tmp_path], None, prompting=Prompting("p"))
    lock, being_read, most = threading.Lock(), 0, 0

    def counted(data: bytes) -> Image.Image:
        nonlocal being_read, most
        with lock:
            being_read += 1
            most = max(most, being_read)
        time.sleep(0.01)
        with lock:
            being_read -= 1
        return decode(data)

    monkeypatch.setattr(scoring, "PIXELS_AHEAD", 2 * 1600)
    monkeypatch.setattr(scoring, "decode", counted)
    scores, reward = count([tmp_path], None, prompting=Prompting("p"))
    assert [row["counting"] for row in scores.rows] == [row["counting"] for row in expected.rows]
    assert at_once.batches == [4, 4, 4] and max(reward.batches) == 3 and most <= 2
    # One picture may be larger than the bound.
    monkeypatch.setattr(scoring, "PIXELS_AHEAD", 100)
    assert count([tmp_path], None, prompting=Prompting("p"))[1].batches == [1] * 12


def test_sharpness_in_strips_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = noise("RGB", (61, 203))
    reward = load_reward("sharpness")
    expected = reward.score([picture], [""])
    pixels = torch.from_numpy(np.asarray(picture)).permute(2, 0, 1)[None].float() / 255
    assert torch.equal(reward.score_tensors(pixels, [""]), expected)
    grey = np.asarray(picture, dtype=np.float64) / 255 @ np.array([0.299, 0.587, 0.114])
    inner = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    assert float(expected) == pytest.approx(float(np.log10(1e-4 + inner.var())), rel=1e-5)
    for strip in (61, 61 * 5, 61 * 100):
        monkeypatch.setattr(pixel_rewards, "STRIP", strip)
        assert float(reward.score([picture], [""])) == pytest.approx(float(expected), rel=1e-6)
