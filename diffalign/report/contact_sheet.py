"""Write `contact.html`: groups of images from best to worst, with their scores. One file, no network."""

from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.files import write_whole
from diffalign.files.images import data_uri, encoded
from diffalign.redaction import without_folders
from diffalign.report.page import render_page

THUMBNAIL = 224


def small_picture(image: Image.Image) -> str:
    """Return an image as a data URI, at most 224 px wide; small ones stay lossless."""
    image = image.convert("RGB")
    if max(image.size) <= THUMBNAIL:
        return data_uri(encoded(image, "PNG"), "png")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return data_uri(encoded(image, "JPEG", quality=80), "jpeg")


def write_contact_sheet(path: Path, name: str, facts: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Write the page.

    facts: shown as a table of two columns. groups: {"prompt", "split", "dropped" (a reason or None), "images"}, the
    images in the order in which they are shown, each {"image" (a data URI, or None with "reason"), "preference" (or
    None), "generator", "seed", "index", "counts" (False: it does not count), "scores": {name: number or None}}.
    """
    shown = without_folders(facts)
    write_whole(
        path,
        render_page("diffalign.report", "contact_sheet.html.j2", name=name, facts=shown, groups=groups),
    )
