"""`contact.html`: groups of images from best to worst, with their scores. One file, no network."""

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from diffalign import __version__
from diffalign.files import write_whole

THUMBNAIL = 224


def data_uri(image: Image.Image) -> str:
    """A picture as a data URI, at most 224 px wide; small ones stay lossless."""
    buffer = io.BytesIO()
    image = image.convert("RGB")
    if max(image.size) > THUMBNAIL:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.save(buffer, format="JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_contact_sheet(path: Path, name: str, facts: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Write the page.

    facts: shown as a table of two columns. groups: {"prompt", "split", "dropped" (a reason or None), "images"}, the images
    in the order in which they are shown, each {"image" (a data URI, or None with "reason"), "preference" (or None),
    "generator", "seed", "index", "counts" (False: left out), "scores": {name: number or None}}.
    """
    environment = Environment(
        loader=PackageLoader("diffalign.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("contact.html.j2").render(
        name=name, version=__version__, facts=facts, groups=groups
    )
    write_whole(path, html)
