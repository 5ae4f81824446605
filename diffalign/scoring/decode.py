"""Decode bytes from any source to an RGB image, or say why that is not possible."""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from diffalign.errors import DiffalignError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Formats that are decoded. Others are refused: EPS, for example, would start another program."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: a file of a few kilobytes can need gigabytes."""
POLICY = "first frame, EXIF orientation applied, 16 bits scaled to 8, alpha dropped"

BROKEN = (OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError, MemoryError,
          struct.error, Image.DecompressionBombError)  # fmt: skip
"""What Pillow's readers raise on damaged files."""


class Unreadable(DiffalignError):
    """One image that cannot be scored; the others can."""


def read_file(path: Path) -> bytes:
    """Return all bytes of a regular file. Raises Unreadable; a named pipe would block for ever."""
    try:
        if path.exists() and not path.is_file():
            raise Unreadable("not a regular file")
        return path.read_bytes()
    except OSError as error:
        raise Unreadable(error.strerror or type(error).__name__) from error


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the image in RGB as people see it. Raises Unreadable with the reason.

    Alpha is dropped, not blended, as in the packages with whose numbers these scores are compared.
    """
    if not data:
        raise Unreadable("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            if opened.width * opened.height > max_pixels:
                raise Unreadable(f"{opened.width} x {opened.height} pixels, more than {max_pixels / 1e6:.0f} million")
            opened.load()
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):
                return _sixteen_bits(picture)
            if picture.mode == "F":
                raise Unreadable("floating-point pixels have no agreed white")
            return picture.convert("RGB")
    except Unreadable:
        raise
    except BROKEN as error:
        what = (
            "not an image of a known format" if "cannot identify" in str(error) else str(error) or type(error).__name__
        )
        raise Unreadable(what.splitlines()[0]) from error


def _sixteen_bits(picture: Image.Image) -> Image.Image:
    """Scale 16 bits to 8. Pillow's own conversion clips at 255, which makes almost every 16-bit image white."""
    values = np.asarray(picture).astype(np.float64)
    return Image.fromarray(np.clip(values / 257 + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
