"""Render HTML pages from templates, with images inside the file."""

import base64
import hashlib
import io

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from PIL import Image

from diffalign.intervals import interval_in
from diffalign.redaction import without_folders
from diffalign.version import __version__


def render_page(package: str, template: str, **values: object) -> str:
    """Return a template of `package` with its values. Text is escaped; a name without a value is an error.

    All pages extend `base.html.j2`, which lies here: the head, the colours of both modes, and a policy by which a browser
    fetches nothing.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("diffalign.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["interval"] = interval_in
    environment.filters["without_folders"] = without_folders
    return environment.get_template(template).render(version=__version__, **values)


def policy_of_script(script: str, images: str) -> str:
    """Return a content security policy for a page with one script: no other script runs, and nothing is fetched.

    images: sources of images. The script must stand between its tags exactly as given.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src {images}; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return the bytes of an image file; kind: Pillow's format name, options: those of its writer."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def data_uri(data: bytes, kind: str) -> str:
    """Return encoded image bytes as a data URI; kind: "png" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
