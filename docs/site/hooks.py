"""Show on the site what lies outside of docs/: pages link to it as they do in the repository.

MkDocs reads one folder. A link that leaves it, such as `../CONTRIBUTING.md`, leads to a copy below `repository/` on the site:
Markdown and notebooks become pages, other files are copied as they are, and a folder becomes a list of its files. The copies
are made while the site is built, so nothing is stored twice.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PREFIX = "repository"
LINK = re.compile(r"(\]\(|(?:src|href)=\")([^)\s\"#]+)(#[^)\"]*)?(?=[)\"])")
CODE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
Content = str | bytes
"""Markdown, or the bytes of another file."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file outside of docs/ that a page links to or the navigation names, and lead the links there."""
    root, docs = Path(config.config_file_path).parent, Path(config.docs_dir).name
    pages = {f"{docs}/{file.src_uri}": file for file in files.documentation_pages()}
    found: dict[str, Content] = {}
    waiting = [
        *_named(config.nav),
        *(one for place, file in pages.items() for one in _links(place, file.content_string)),
    ]
    while waiting:
        target = waiting.pop()
        if target in found or target.startswith(f"{docs}/") or not (root / target).exists():
            continue
        found[target] = content = _content(root / target)
        if isinstance(content, str):
            waiting += _links(target, content)
    for target, content in found.items():
        text = _moved(target, content, found, docs) if isinstance(content, str) else content
        files.append(File.generated(config, _uri(target, content), content=text))
    for place, file in pages.items():
        file.content_string = _moved(place, file.content_string, found, docs)
    return files


def _named(nav: object) -> Iterator[str]:
    """Yield the files outside of docs/ that the navigation names."""
    if isinstance(nav, str) and nav.startswith(f"{PREFIX}/"):
        target = nav.removeprefix(f"{PREFIX}/")
        yield target.removesuffix(".md") if target.endswith(".ipynb.md") else target
    elif isinstance(nav, (dict, list)):
        for one in nav.values() if isinstance(nav, dict) else nav:
            yield from _named(one)


def _links(place: str, text: str) -> Iterator[str]:
    """Yield the files of the repository that a page links to."""
    for found in LINK.finditer(CODE.sub("", text)):
        target = _target(place, found[2])
        if target is not None:
            yield target


def _target(place: str, link: str) -> str | None:
    """Return a link as a path in the repository; None for one that leads elsewhere."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
    return None if "://" in link or link.startswith(("mailto:", "/")) or target.startswith("..") else target


def _content(path: Path) -> Content:
    """Return a page's Markdown, or the bytes of any other file."""
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.is_file() and p.suffix not in (".py", ".pyc"))
        return f"# {path.name}/\n\n" + "".join(f"- [{name}]({path.name}/{name})\n" for name in names)
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
        return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for text, kind in texts) + "\n"
    return path.read_text(encoding="utf-8") if path.suffix == ".md" else path.read_bytes()


def _uri(target: str, content: Content) -> str:
    """Return where on the site a file of the repository lies."""
    return f"{PREFIX}/{target}" + (".md" if isinstance(content, str) and not target.endswith(".md") else "")


def _moved(place: str, text: str, found: dict[str, Content], docs: str) -> str:
    """Return a page with its links as they are on the site."""
    inside = place.startswith(f"{docs}/")
    here = place.removeprefix(f"{docs}/") if inside else _uri(place, "")

    def link(match: re.Match[str]) -> str:
        target = _target(place, match[2])
        if target in found:
            there = _uri(target, found[target])
        elif target is not None and target.startswith(f"{docs}/") and not inside:
            there = target.removeprefix(f"{docs}/")
        else:
            return match[0]
        return f"{match[1]}{posixpath.relpath(there, posixpath.dirname(here) or '.')}{match[3] or ''}"

    return LINK.sub(link, text)
