"""Render HTML pages from templates."""

import base64
import hashlib

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

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
