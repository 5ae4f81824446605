"""Make the small pictures of a page: inside the file, or in a folder beside it where there are many."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.files import make_folder, replacing
from diffalign.files.images import Unreadable, data_uri, decode, encoded
from diffalign.scoring.items import Item, digest

THUMBNAIL = 256
INSIDE = 400
"""Images whose thumbnails lie inside the page; those of more lie beside it."""
BESIDE = 16_000_000
"""Bytes of all thumbnails beside a page. Each has at least `LEAST` of them and at most `MOST`."""
LEAST, MOST = 2_500, 20_000
# (side in pixels, WebP quality), tried in turn until a thumbnail fits.
SIZES = ((256, 80), (256, 60), (192, 60), (160, 50), (128, 45), (96, 40), (64, 30))
OURS = re.compile(r"[0-9a-f]{24}\.webp")


def thumbnail(item: Item, side: int = THUMBNAIL) -> str:
    """Return the image as a data URI of at most `side` pixels; "" if it cannot be read."""
    try:
        picture = decode(item.origin.read())
    except Unreadable:
        return ""
    picture.thumbnail((side, side), Image.Resampling.BICUBIC)
    return data_uri(encoded(picture, "JPEG", quality=82), "jpeg")


def thumbnails_of(page: Path, items: list[Item]) -> list[str]:
    """Return the sources of `<img>` for a page, in the order of the items; "" for an image that cannot be read.

    Few are data URIs. More are written to `folder_beside(page)`, each under the hash of its image's bytes. Raises
    DiffalignError if that folder is a link or cannot be made.
    """
    workers = min(8, os.cpu_count() or 1)
    if len(items) <= INSIDE:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(thumbnail, items))
    folder = folder_beside(page)
    if folder.is_symlink():
        raise DiffalignError(f"{folder}: a link, where the page's thumbnails belong; rename it, or name another --html")
    make_folder(folder)
    room = max(LEAST, min(MOST, BESIDE // len(items)))
    sources = []
    with ThreadPoolExecutor(workers) as pool:
        for name, data in pool.map(lambda item: _small(item, room), items):
            if name:
                with replacing(folder / name) as part:
                    part.write_bytes(data)
            sources.append(f"{quote(folder.name)}/{name}" if name else "")
    return sources


def folder_beside(page: Path) -> Path:
    """Return the folder of a page's thumbnails: `scores_thumbnails` of `scores.html`."""
    return page.with_name(f"{page.stem}_thumbnails")


def _small(item: Item, room: int) -> tuple[str, bytes]:
    """Return a thumbnail's name and bytes, at most `room` of them if a small size allows; ("", b"") if unreadable."""
    try:
        data = item.origin.read()
        picture = decode(data)
    except Unreadable:
        return "", b""
    small = b""
    for side, quality in SIZES:
        picture.thumbnail((side, side), Image.Resampling.BICUBIC)
        small = encoded(picture, "WEBP", quality=quality, method=0)  # four times as fast as the default
        if len(small) <= room:
            break
    return f"{digest(data)[:24]}.webp", small


def delete_unused(page: Path, sources: list[str]) -> None:
    """Delete the thumbnails that an earlier page had, and their folder if nothing is left in it; other files stay."""
    folder = folder_beside(page)
    if folder.is_symlink() or not folder.is_dir():
        return
    used = {source.rpartition("/")[2] for source in sources}
    for path in folder.iterdir():
        if OURS.fullmatch(path.name) and path.name not in used:
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
