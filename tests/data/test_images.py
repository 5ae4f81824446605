"""One decoder for scoring, datasets, training and judges: what people see, or one reason."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from diffalign.data.buckets import fit, header_size
from diffalign.data.dataset import ImageRow
from diffalign.data.imported import ImportedGroup, write_imported
from diffalign.errors import DiffalignError
from diffalign.files import images
from diffalign.files.images import Unreadable, area, decode, displayed_size
from diffalign.judge.forward import open_image
from diffalign.rewards.pixels import crop_square
from helpers import pictures


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return pictures.encoded(pictures.smooth(1), "JPEG", exif=exif, quality=95)


def sixteen() -> bytes:
    grey = np.asarray(pictures.smooth(1).convert("L")).astype(np.uint16) * 257
    return pictures.encoded(Image.fromarray(grey), "PNG")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_reader_turns_a_photo_upright(tmp_path: Path, orientation: int) -> None:
    data = turned(orientation)
    size = (64, 96) if orientation > 4 else (96, 64)
    (tmp_path / "a.jpg").write_bytes(data)
    assert decode(data).size == size
    assert displayed_size(data) == size
    assert ImageRow("g", 0, data, "", 0).decode().size == size
    assert header_size(data, "g", 0) == size
    assert open_image(tmp_path / "a.jpg").size == size


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    wanted = np.asarray(pictures.smooth(1).convert("L")).astype(int)
    (tmp_path / "a.png").write_bytes(sixteen())
    for image in (decode(sixteen()), ImageRow("g", 0, sixteen(), "", 0).decode(), open_image(tmp_path / "a.png")):
        assert np.abs(np.asarray(image)[..., 0].astype(int) - wanted).max() <= 1


def transparent(mode: str) -> bytes:
    """The left half is opaque (0, 0, 0) or grey 0, the right half is transparent over the same hidden values."""
    if mode == "P":
        image = Image.new("P", (8, 4), 0)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.paste(1, (4, 0, 8, 4))
        return pictures.encoded(image, "PNG", transparency=1)
    if mode == "L":
        image = Image.new("L", (8, 4), 0)
        image.paste(7, (4, 0, 8, 4))
        return pictures.encoded(image, "PNG", transparency=7)
    image = Image.new(mode, (8, 4), (0,) * (len(mode) - 1) + (255,))
    image.paste((0,) * len(mode), (4, 0, 8, 4))
    return pictures.encoded(image, "PNG")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparency_shows_white(mode: str) -> None:
    found = np.asarray(decode(transparent(mode)))
    assert (found[:, :4] == 0).all()
    assert (found[:, 4:] == 255).all()


def test_half_transparent_pixels_are_mixed_and_opaque_ones_keep_their_values() -> None:
    half = pictures.encoded(Image.new("RGBA", (2, 2), (100, 0, 50, 128)), "PNG")
    share = 128 / 255
    wanted = np.array([100, 0, 50]) * share + 255 * (1 - share)
    assert np.abs(np.asarray(decode(half))[0, 0] - wanted).max() <= 1
    photo = pictures.smooth(3)
    opaque = pictures.encoded(photo.convert("RGBA"), "PNG")
    assert (np.asarray(decode(opaque)) == np.asarray(photo)).all()


def test_no_reader_starts_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was started"))
    (tmp_path / "a.png").write_bytes(vector)
    with pytest.raises(DiffalignError, match="not an image of a known format"):
        ImageRow("g", 0, vector, "", 0).decode()
    with pytest.raises(DiffalignError, match="not an image of a known format"):
        header_size(vector, "g", 0)
    with pytest.raises(DiffalignError, match="not an image of a known format"):
        open_image(tmp_path / "a.png")
    with pytest.raises(DiffalignError, match=r"a.png is not a complete image \(not an image of a known format"):
        write_imported([ImportedGroup("p", (tmp_path / "a.png",) * 2, (1.0, 0.0), "here")], tmp_path / "out")


def test_every_reader_has_the_limit_of_pixels() -> None:
    with pytest.raises(DiffalignError, match="40000 x 40000 pixels|exceeds limit"):
        ImageRow("g", 0, pictures.bomb(), "", 0).decode()


def test_the_area_is_read_without_the_pixels() -> None:
    """The pixels of the PNG are cut off: what decodes it to find its orientation would find nothing."""
    whole = pictures.encoded(Image.new("RGB", (300, 200)), "PNG")
    assert area(whole[:45]) == area(whole) == 60_000
    assert area(b"no image") == area(b"") == 0


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, AttributeError, KeyError, MemoryError])
def test_whatever_pillow_raises_is_a_reason(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("no frame")

    data = pictures.encoded(Image.new("RGB", (4, 4)), "PNG")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(Unreadable, match="no frame"):
        decode(data)


@pytest.mark.parametrize("kind", ["AVIF", "PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_damaged_files_are_unreadable_and_nothing_else(kind: str) -> None:
    data = bytearray(pictures.encoded(pictures.smooth(5, 40, 24), kind))
    rng = np.random.default_rng(7)
    for _ in range(150):
        hurt = bytearray(data)
        for place in rng.integers(0, len(hurt), size=int(rng.integers(1, 6))):
            hurt[place] = int(rng.integers(0, 256))
        if rng.random() < 0.2:
            hurt = hurt[: int(rng.integers(0, len(hurt)))]
        for read in (decode, displayed_size):
            try:
                read(bytes(hurt))
            except Unreadable as error:
                assert "\n" not in str(error) and str(error)


@pytest.mark.parametrize("compressed", [True, False])
def test_a_large_workflow_in_a_png_is_no_obstacle(compressed: bool) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "a" * 3_000_000, zip=compressed)
    assert decode(pictures.encoded(pictures.smooth(1), "PNG", pnginfo=info)).size == (96, 64)
    info.add_itxt("prompt", "b" * 3_000_000, zip=compressed)
    assert decode(pictures.encoded(pictures.smooth(1), "PNG", pnginfo=info)).size == (96, 64)


def test_formats_of_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    phone = b"\0\0\0\x18ftypheic" + b"\0" * 40
    images._plugin_formats.cache_clear()
    if "pillow_heif" not in sys.modules:
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(Unreadable, match="HEIF needs a plugin: pip install pillow-heif"):
        decode(phone)
    with pytest.raises(Unreadable, match="JXL needs a plugin: pip install pillow-jxl-plugin"):
        decode(b"\xff\x0a" + b"\0" * 40)
    called = []
    module = types.SimpleNamespace(register_heif_opener=lambda: called.append(True))
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    images._plugin_formats.cache_clear()
    with pytest.raises(Unreadable):
        decode(phone)
    assert called == [True]
    images._plugin_formats.cache_clear()


@pytest.mark.parametrize("size", [(12000, 3), (8000, 1), (1, 8000), (3, 12000), (20000, 40)])
def test_strips_are_cropped_before_they_cost_memory(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    strip = pictures.smooth(2, *size)
    resize = Image.Image.resize

    def bounded(image: Image.Image, wanted: tuple[int, int], *rest: object, **named: object) -> Image.Image:
        assert wanted[0] * wanted[1] < 10_000_000
        return resize(image, wanted, *rest, **named)  # type: ignore[arg-type]

    plain = np.asarray(image_of_middle(strip, 64))
    monkeypatch.setattr(Image.Image, "resize", bounded)
    square = crop_square(strip, 224, "floor")
    assert square.shape == (3, 224, 224)
    assert fit(strip, (64, 48)).shape == (48, 64, 3)
    assert np.abs(fit(strip, (64, 64)).astype(int) - plain.astype(int)).max() <= 2


def image_of_middle(strip: Image.Image, side: int) -> Image.Image:
    """Resize all of the strip and cut out the middle."""
    scale = side / min(strip.size)
    width, height = (max(side, round(s * scale)) for s in strip.size)
    left, top = (width - side) // 2, (height - side) // 2
    whole = strip.resize((width, height), Image.Resampling.LANCZOS)
    return whole.crop((left, top, left + side, top + side))
