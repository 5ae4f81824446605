"""Pictures for tests: smooth ones, and every kind that a folder from the internet may hold."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def smooth(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    """Low frequencies only, as in a photograph: neighbouring pixels resemble each other."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    planes = []
    for _ in range(3):
        a, b, c, d = rng.uniform(1, 7, size=4)
        planes.append(128 + 60 * np.sin(a * x + b * y + c) + 50 * np.cos(d * (x - y)))
    return Image.fromarray(np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8))


def folder(path: Path, count: int, prompts: list[str] | None = None) -> Path:
    """`count` pictures of different sharpness, and a metadata.jsonl with their prompts."""
    path.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        noise = np.random.default_rng(i).normal(0, 1 + i, (40, 48, 3))
        Image.fromarray(np.clip(128 + noise, 0, 255).astype(np.uint8)).save(path / f"{i:03d}.png")
        rows.append({"file_name": f"{i:03d}.png", "prompt": (prompts or ["a cat"])[i % len(prompts or [0])]})
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 40000 x 40000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 40001))
        + chunk(b"IEND", b"")
    )


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def hostile(path: Path) -> tuple[set[str], dict[str, str]]:
    """Fills a folder; returns names of the pictures that must get a score, and for the others a word of the reason."""
    path.mkdir(parents=True)
    good: dict[str, bytes] = {}
    photo = smooth(1)
    good["plain.png"] = encoded(photo, "PNG")
    good["copy of plain.png"] = good["plain.png"]
    good["cmyk.jpg"] = encoded(photo.convert("CMYK"), "JPEG")
    palette = photo.convert("P")
    good["palette.png"] = encoded(palette, "PNG", transparency=3)
    good["alpha.webp"] = encoded(photo.convert("RGBA"), "WEBP", lossless=True)
    good["sixteen.png"] = encoded(Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257), "PNG")
    frames = [smooth(i).convert("P") for i in range(3)]
    good["animated.gif"] = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    good["turned.jpg"] = encoded(photo, "JPEG", exif=exif, quality=95)
    good["größe 大.png"] = encoded(smooth(2), "PNG")
    good["<img src=x onerror=alert(2)>.png"] = encoded(smooth(4), "PNG")
    good["new\nline.png"] = encoded(smooth(3), "PNG")
    good["one.bmp"] = encoded(Image.new("RGB", (8, 8), (200, 0, 0)), "BMP")
    for name, data in good.items():
        (path / name).write_bytes(data)
    (path / "empty.png").write_bytes(b"")
    (path / "truncated.jpg").write_bytes(encoded(photo, "JPEG")[:700])
    (path / "bomb.png").write_bytes(bomb())
    (path / "text.png").write_text("I am no picture")
    (path / "vector.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    (path / "loop.png").symlink_to("loop.png")
    os.mkfifo(path / "pipe.png")
    (path / "up").symlink_to(path, target_is_directory=True)
    os.write(fd := os.open(os.fsencode(path) + b"/bytes\xff.png", os.O_CREAT | os.O_WRONLY), good["plain.png"])
    os.close(fd)
    (path / "notes.md").write_text("not looked at")
    bad = {
        "empty.png": "empty file",
        "truncated.jpg": "truncated",
        "bomb.png": "pixels",
        "text.png": "not an image",
        "vector.png": "not an image",
        "loop.png": "symbolic link",
        "pipe.png": "not a regular file",
    }
    return {*good, "bytes\\udcff.png"}, bad
