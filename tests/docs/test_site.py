"""The site's hook, which shows on the site what lies outside of docs/, and what its pages load."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ARXIV = re.compile(r"arxiv(?:\.org/abs/|[ :]+)(\d{4}\.\d{4,5})(?: and (\d{4}\.\d{4,5}))?", re.IGNORECASE)


class PlainLoader(yaml.SafeLoader):
    """Reads mkdocs.yml without the tags of its plugins."""


def named(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [name for one in (nav.values() if isinstance(nav, dict) else nav) for name in named(one)]


CONFIG: dict[str, Any] = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), PlainLoader)


def test_every_page_is_in_the_navigation() -> None:
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    inside = [name for name in named(CONFIG["nav"]) if not name.startswith("repository/")]
    assert sorted(inside) == sorted(pages)
    for name in set(named(CONFIG["nav"])) - set(inside):
        path = name.removeprefix("repository/").removesuffix(".md" if ".ipynb" in name else "")
        assert (ROOT / path).is_file()


def test_the_site_loads_nothing_from_elsewhere() -> None:
    """No fonts, and in place of the worker that the theme would load, one of ours."""
    assert CONFIG["theme"]["font"] is False and "offline" in CONFIG["plugins"] and CONFIG["strict"] is True
    (script,) = CONFIG["extra"]["polyfills"]
    assert "iframe-worker" in script and (DOCS / script).is_file()
    assert not re.search(r"https?://", (DOCS / script).read_text() + (DOCS / "site" / "extra.css").read_text())


@pytest.fixture(scope="module")
def hooks() -> Any:
    """The hook as a module; only its types come from MkDocs, which the tests do without."""
    names = ("mkdocs", "mkdocs.config", "mkdocs.config.defaults", "mkdocs.structure", "mkdocs.structure.files")
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules["mkdocs.config.defaults"].MkDocsConfig = object  # type: ignore[attr-defined]
    for name in ("File", "Files"):
        setattr(sys.modules["mkdocs.structure.files"], name, object)
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site" / "hooks.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    for name, module in before.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module
    return made


@pytest.mark.parametrize(
    ("place", "text", "moved"),
    [
        ("docs/a.md", "[c](../CONTRIBUTING.md#style)", "[c](repository/CONTRIBUTING.md#style)"),
        ("docs/tutorials/a.md", "[n](../../x/n.ipynb)", "[n](../repository/x/n.ipynb.md)"),
        ("docs/a.md", "[r](../configs/r.yaml) [b](b.md)", "[r](repository/configs/r.yaml) [b](b.md)"),
        ("README.md", '<img src="docs/images/q.png"> [d](docs/b.md)', '<img src="../images/q.png"> [d](../b.md)'),
        ("x/n.ipynb", "[c](../CONTRIBUTING.md)", "[c](../CONTRIBUTING.md)"),
        (
            "docs/a.md",
            "[h](https://host/../CONTRIBUTING.md) [t](#top)",
            "[h](https://host/../CONTRIBUTING.md) [t](#top)",
        ),
    ],
)
def test_links_out_of_the_folder_lead_to_copies(hooks: Any, place: str, text: str, moved: str) -> None:
    found = {"CONTRIBUTING.md": "", "README.md": "", "x/n.ipynb": "", "configs/r.yaml": b""}
    assert hooks._moved(place, text, found, "docs") == moved


def test_a_notebook_and_a_folder_become_pages(hooks: Any, tmp_path: Path) -> None:
    cells = [{"cell_type": "markdown", "source": ["# T\n", "text"]}, {"cell_type": "code", "source": ["a = 1"]}]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
    assert hooks._content(tmp_path / "n.ipynb") == "# T\ntext\n\n```python\na = 1\n```\n"
    assert hooks._content(tmp_path) == f"# {tmp_path.name}/\n\n- [n.ipynb]({tmp_path.name}/n.ipynb)\n"


class Page(types.SimpleNamespace):
    """A file of the site, as the hook makes one and reads one."""

    @classmethod
    def generated(cls, config: Any, uri: str, *, content: str | bytes) -> Page:
        return cls(src_uri=uri, content_string=content)


class Pages(list[Page]):
    def documentation_pages(self) -> list[Page]:
        return [page for page in self if page.src_uri.endswith(".md")]


def test_what_pages_and_the_navigation_name_is_added(
    hooks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what those copies link to; nothing that a block of code shows, is not there, or lies above the repository."""
    monkeypatch.setattr(hooks, "File", Page)
    root = tmp_path / "root"
    for name in ("MORE.md", "NAMED.md", "DEEP.md", "SHOWN.md", "x.yaml", "docs/a.md", "../OUT.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    (root / "MORE.md").write_text("[d](DEEP.md) [a](docs/a.md)")
    text = "[m](../MORE.md#part) [x](../x.yaml) [no](../NO.md) [o](../../OUT.md)\n```\n[s](../SHOWN.md)\n```\n"
    files = Pages([Page(src_uri="a.md", content_string=text), Page(src_uri="a.png", content_string="")])
    config = types.SimpleNamespace(
        config_file_path=str(root / "mkdocs.yml"),
        docs_dir=str(root / "docs"),
        nav=["a.md", {"N": "repository/NAMED.md"}],
    )
    found = {page.src_uri: page.content_string for page in hooks.on_files(files, config)}
    copies = {name for name in found if name.startswith("repository/")}
    assert copies == {f"repository/{name}" for name in ("MORE.md", "NAMED.md", "DEEP.md", "x.yaml")}
    assert found["a.md"] == text.replace("../MORE", "repository/MORE").replace("../x.yaml", "repository/x.yaml")
    assert found["repository/MORE.md"] == "[d](DEEP.md) [a](../a.md)" and found["repository/x.yaml"] == b""


def cited(folder: Path, pattern: str) -> set[str]:
    texts = (path.read_text(encoding="utf-8") for path in folder.rglob(pattern))
    return {number for text in texts for found in ARXIV.findall(text) for number in found if number}


def test_the_papers_page_lists_what_the_code_cites() -> None:
    in_code = cited(ROOT / "diffalign", "*.py") | cited(ROOT / "rewards", "*.py") | cited(ROOT / "pipelines", "*.py")
    assert cited(DOCS, "papers.md") == in_code
