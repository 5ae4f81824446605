"""Give the package its long description: README.md, with links that also work away from the repository.

All else stands in pyproject.toml. Relative links become absolute with the address in `[project.urls]` under `Repository`;
without one they become plain text, and images are left out.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|mailto:)([^)\s]+)\)")
IMAGE = re.compile(r"<img [^>]*?src=\"(?!https?://)([^\"]+)\"[^>]*>")


def long_description(text: str, repository: str | None) -> str:
    """Return README.md for readers elsewhere; a link to a heading of the page itself stays as it is."""

    def link(found: re.Match[str]) -> str:
        image, words, target = found.groups()
        if target.startswith("#"):
            return found[0]
        if repository is None:
            return "" if image else words
        return f"{image}[{words}]({repository}/{'raw' if image else 'blob'}/main/{target})"

    def picture(found: re.Match[str]) -> str:
        return "" if repository is None else found[0].replace(found[1], f"{repository}/raw/main/{found[1]}")

    return IMAGE.sub(picture, LINK.sub(link, text))


if __name__ == "__main__":
    root = Path(__file__).resolve().parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project.get("urls", {}).get("Repository")
    setup(
        long_description=long_description((root / "README.md").read_text(encoding="utf-8"), repository),
        long_description_content_type="text/markdown",
    )
