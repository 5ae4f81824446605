"""Decode bytes from any source to an RGB image, or say why that is not possible, and encode images. Everything does it here."""

import base64
import importlib
import io
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageOps

from diffalign.error_codes import UNREADABLE_IMAGE
from diffalign.errors import DiffalignError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Formats that are decoded. Others are refused: EPS, for example, would start another program."""
PLUGINS = {"HEIF": ("pillow_heif", "pillow-heif"), "JXL": ("pillow_jxl", "pillow-jxl-plugin")}
"""Formats that a package adds: format -> (module, package)."""
PLUGIN_STARTS = {"HEIF": (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"), "JXL": (b"JXL ", b"\xff\x0a")}
"""What stands in the first 12 bytes of such a file."""
SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif",
            ".heic", ".heif", ".jxl")  # fmt: skip
MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: a file of a few kilobytes can need gigabytes."""
MAX_BYTES = 1_000_000_000
"""Larger files are refused before they are read: a sparse file of any size takes no disk."""
STRIP = 256
"""Rows that are converted at once, so that an image takes little more memory than its pixels."""
THIN = 64
"""How many times the box an image's side must be before `resized_crop` resizes nothing but the box."""
GROUND = (255, 255, 255)
"""What lies behind transparent pixels."""
POLICY = "first frame, EXIF orientation applied, 16 bits scaled to 8, transparency on white"

BROKEN = (OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError, MemoryError,
          RuntimeError, struct.error, Image.DecompressionBombError)  # fmt: skip
"""What Pillow's readers raise on damaged files."""
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
UNUSED_CHUNKS = (*TEXT_CHUNKS, b"iCCP")
ORIENTATION = 0x0112  # EXIF


class Unreadable(DiffalignError):
    """One image that cannot be read; the others can."""

    fixed_code = UNREADABLE_IMAGE


def read_file(path: Path) -> bytes:
    """Return all bytes of a regular file. Raises Unreadable; a named pipe would block for ever."""
    try:
        if path.exists() and not path.is_file():
            raise Unreadable("not a regular file")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise Unreadable(f"{size} bytes, more than {MAX_BYTES}")
        return path.read_bytes()
    except (OSError, ValueError, MemoryError) as error:
        raise Unreadable(getattr(error, "strerror", None) or type(error).__name__) from error


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the image in RGB as people see it (`POLICY`). Raises Unreadable with the reason."""
    try:
        with _opened(data) as opened:
            return _as_seen(opened, max_pixels)
    except BROKEN as error:
        raise Unreadable(_reason(error, data)) from error


def as_seen(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return an image of Pillow in RGB as people see it, as `decode` does for a file; of several frames, the current one.

    Raises Unreadable with the reason.
    """
    try:
        return _as_seen(image, max_pixels)
    except BROKEN as error:
        raise Unreadable(_reason(error, b"")) from error


def _as_seen(opened: Image.Image, max_pixels: int) -> Image.Image:
    if opened.width * opened.height > max_pixels:
        raise Unreadable(f"{opened.width} x {opened.height} pixels, more than {max_pixels / 1e6:.0f} million")
    opened.load()
    # Without a turn this would be a copy.
    image = opened if opened.getexif().get(ORIENTATION, 1) == 1 else ImageOps.exif_transpose(opened)
    if image.mode == "I" and cast("tuple[int, int]", image.getextrema())[1] > 65_535:
        raise Unreadable("32-bit integer pixels have no agreed white")
    if image.mode.startswith("I"):
        return _sixteen_bits(image)
    if image.mode == "F":
        raise Unreadable("floating-point pixels have no agreed white")
    return _on_ground(image)


def area(data: bytes) -> int:
    """Return how many pixels an image has, from its header; 0 if that cannot be read."""
    try:
        # Not displayed_size: Pillow decodes a PNG to look for its orientation, which is no matter here.
        with _opened(data) as opened:
            return opened.width * opened.height
    except (*BROKEN, Unreadable):
        return 0


def displayed_size(data: bytes) -> tuple[int, int]:
    """Return width and height of the image that `decode` returns, from its header. Raises Unreadable."""
    try:
        with _opened(data) as opened:
            turned = opened.getexif().get(ORIENTATION) in (5, 6, 7, 8)  # EXIF orientations that swap the sides
            return (opened.height, opened.width) if turned else (opened.width, opened.height)
    except BROKEN as error:
        raise Unreadable(_reason(error, data)) from error


def resized_crop(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int], resample: Image.Resampling
) -> Image.Image:
    """Return `image.resize(size).crop(box)`; of an image that is very much larger than the box, only the box is resized.

    A strip of 12000 x 3 pixels would otherwise grow to 896000 x 224, which takes 800 MB.
    """
    width, height = box[2] - box[0], box[3] - box[1]
    if size[0] > THIN * width or size[1] > THIN * height:
        x, y = image.width / size[0], image.height / size[1]
        return image.resize((width, height), resample, box=(box[0] * x, box[1] * y, box[2] * x, box[3] * y))
    return (image.resize(size, resample) if size != image.size else image).crop(box)


def _opened(data: bytes) -> Image.Image:
    if not data:
        raise Unreadable("empty file")
    # Pillow refuses a PNG with more than 1 MB of compressed text, such as a workflow; its pixels need no text.
    for chunks in (
        (data, _without_text(data)) if data.startswith(b"\x89PNG") and (b"TXt" in data or b"iCCP" in data) else (data,)
    ):
        try:
            return Image.open(io.BytesIO(chunks), formats=(*FORMATS, *_plugin_formats()))
        except ValueError as error:
            if "MAX_TEXT" not in str(error):
                raise
    raise Unreadable("more text in it than Pillow reads")


def _without_text(data: bytes) -> bytes:
    """Return a PNG file without its text chunks and its colour profile, which is not used."""
    kept, at = [data[:8]], 8
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        if data[at + 4 : at + 8] not in UNUSED_CHUNKS:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return the bytes of an image file; kind: Pillow's format name, options: those of its writer."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def data_uri(data: bytes, kind: str) -> str:
    """Return encoded image bytes as a data URI; kind: "png" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@cache
def _plugin_formats() -> tuple[str, ...]:
    """Return the formats whose package is installed, after making Pillow know them."""
    found = []
    for name, (module, _) in PLUGINS.items():
        try:
            plugin = importlib.import_module(module)
        except ImportError:
            continue
        if name == "HEIF":
            plugin.register_heif_opener()
        found.append(name)
    return tuple(found)


def _reason(error: BaseException, data: bytes) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        for name, starts in PLUGIN_STARTS.items():
            if name not in _plugin_formats() and any(start in data[:12] for start in starts):
                return f"{name} needs a plugin: pip install {PLUGINS[name][1]}"
        return "not an image of a known format"
    return (str(error) or type(error).__name__).splitlines()[0]


def _sixteen_bits(image: Image.Image) -> Image.Image:
    """Scale 16 bits to 8. Pillow's own conversion clips at 255, which makes almost every 16-bit image white."""
    scaled = Image.new("L", image.size)
    for box in _strips(image):
        values = np.asarray(image.crop(box)).astype(np.float64)
        scaled.paste(Image.fromarray(np.clip(values / 257 + 0.5, 0, 255).astype(np.uint8)), box)
    return scaled.convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Yield the boxes of an image's strips, from top to bottom."""
    for top in range(0, image.height, STRIP):
        yield (0, top, image.width, min(top + STRIP, image.height))


def _on_ground(image: Image.Image) -> Image.Image:
    """Return the image in RGB; where it is transparent, `GROUND` shows through. Opaque pixels keep their values."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    shown = Image.new("RGB", image.size)
    for box in _strips(image):
        layer = image.crop(box).convert("RGBA")
        if layer.getchannel("A").getextrema() != (255, 255):
            layer = Image.alpha_composite(Image.new("RGBA", layer.size, (*GROUND, 255)), layer)
        shown.paste(layer.convert("RGB"), box)
    return shown
