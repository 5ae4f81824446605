"""Bytes that anybody may have written, to an RGB picture or to the reason why not."""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from diffalign.errors import DiffalignError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""What is decoded at all. EPS, for one, would start another program."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
MAX_PIXELS = 100_000_000
"""Larger pictures are refused before they are decoded: a file of a few kilobytes can ask for gigabytes."""
POLICY = "first frame, EXIF orientation applied, 16 bits scaled to 8, alpha dropped"

BROKEN = (OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError, MemoryError,
          struct.error, Image.DecompressionBombError)  # fmt: skip
"""What Pillow's readers raise on damaged files."""


class Unreadable(DiffalignError):
    """This one picture cannot be scored; the others can."""


def read_file(path: Path) -> bytes:
    """All bytes of a regular file. Raises Unreadable: a named pipe would wait for ever."""
    try:
        if path.exists() and not path.is_file():
            raise Unreadable("not a regular file")
        return path.read_bytes()
    except OSError as error:
        raise Unreadable(error.strerror or type(error).__name__) from error


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """RGB picture as people see it. Raises Unreadable with the reason.

    Alpha is dropped, not blended: so do the packages whose numbers these scores are compared with.
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
        what = "no picture of a known format" if "cannot identify" in str(error) else str(error) or type(error).__name__
        raise Unreadable(what.splitlines()[0]) from error


def _sixteen_bits(picture: Image.Image) -> Image.Image:
    """Pillow's own conversion clips at 255, which makes almost every 16-bit picture white."""
    values = np.asarray(picture).astype(np.float64)
    return Image.fromarray(np.clip(values / 257 + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
