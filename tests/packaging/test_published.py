"""What is published beside the code: metadata, long description, citation, container, and the size of the wheel."""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SITE = os.environ.get("DIFFALIGN_SITE")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RELATIVE = re.compile(r"\]\((?!https?://|#)|src=\"(?!https?://)")


@pytest.fixture(scope="module")
def setup_module_() -> Any:
    """setup.py as a module; it does nothing on import."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("setup_of_diffalign", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_long_description_has_no_relative_links(setup_module_: Any) -> None:
    assert RELATIVE.search(README)
    plain = setup_module_.long_description(README, None)
    assert not RELATIVE.search(plain) and "<img" not in plain
    # The words of a link stay, and code that looks like one does, too.
    assert "[results]" not in plain and "results" in plain and "sources=[pickscore]" in plain


def test_with_an_address_links_are_absolute(setup_module_: Any) -> None:
    full = setup_module_.long_description(README, "https://host/us/diffalign")
    assert not RELATIVE.search(full)
    assert "](https://host/us/diffalign/blob/main/docs/results.md)" in full
    assert 'src="https://host/us/diffalign/raw/main/docs/images/quickstart.png"' in full
    assert full.count("](") == README.count("](")


def test_each_kind_of_link(setup_module_: Any) -> None:
    """Also those that README.md has none of now."""
    text = '[a](docs/a.md) ![b](b.png) [c](#c) [d](https://h/d) <img src="e.png" width="9"> <img src="https://h/f.png">'
    plain = 'a  [c](#c) [d](https://h/d)  <img src="https://h/f.png">'
    full = (
        "[a](https://r/blob/main/docs/a.md) ![b](https://r/raw/main/b.png) [c](#c) [d](https://h/d) "
        '<img src="https://r/raw/main/e.png" width="9"> <img src="https://h/f.png">'
    )
    found = setup_module_.long_description
    assert found(text, None) == plain and found(text, "https://r") == full


def test_the_metadata_is_complete() -> None:
    assert PROJECT["authors"] == [{"name": "diffalign contributors"}] and set(PROJECT["dynamic"]) == {
        "version",
        "readme",
    }
    trove = pytest.importorskip("trove_classifiers", reason="comes with some build tools")
    assert set(PROJECT["classifiers"]) <= set(trove.classifiers)


def test_the_citation_names_a_release() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert set(citation) >= {"cff-version", "message", "title", "authors", "version", "date-released", "license"}
    assert citation["license"] == PROJECT["license"] and citation["authors"] == PROJECT["authors"]
    released = f"## {citation['version']} - {citation['date-released']}"
    assert released in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()


def test_the_issue_templates_are_forms() -> None:
    forms = [p for p in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").iterdir()) if p.name != "config.yml"]
    assert forms
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert form["name"] and form["description"]
        assert {part["type"] for part in form["body"]} <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        assert all(part["attributes"]["label"] for part in form["body"])


def test_the_container_gets_what_the_package_is_built_from() -> None:
    """A builder copies what .dockerignore leaves: every mapped folder, and each file that pyproject.toml or setup.py reads."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    rules = [line for line in lines if line and not line.startswith("#")]
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    assert rules[0] == "*" and "**/__pycache__" in rules
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    needed = {*tools["package-dir"].values(), *PROJECT["license-files"], "README.md", "pyproject.toml", "setup.py"}
    assert kept == needed and all((ROOT / name).exists() for name in needed)


def test_the_container_runs_the_command() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert 'ENTRYPOINT ["diffalign"]' in lines and "USER 1000" in lines
    extras = next(line for line in lines if line.startswith("ARG EXTRAS=")).partition("=")[2]
    assert extras in PROJECT["optional-dependencies"]
    python = next(line for line in lines if line.startswith("ARG PYTHON=")).partition("=")[2]
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]


def test_the_version_needs_no_git(tmp_path: Path) -> None:
    """From an archive of the source there is no tag; a module that is only on the path has the installed version, or none."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", tools["setuptools_scm"]["fallback_version"])
    (tmp_path / "version.py").write_bytes((ROOT / "diffalign" / "version.py").read_bytes())
    code = "import version; print(version.__version__)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path, env={})
    assert done.stdout == "0+unknown\n", done.stderr


@pytest.mark.skipif(not SITE, reason="of the wheel (make wheel-test)")
def test_the_wheel_is_small() -> None:
    files = [path for path in (Path(SITE or "") / "diffalign").rglob("*") if path.is_file()]
    heavy = {path for path in files if path.stat().st_size > 300_000}
    assert all(fnmatch.fnmatch(str(path), "*/testbed/assets/*.safetensors") for path in heavy), heavy
    assert sum(path.stat().st_size for path in files if "/testbed/assets/" not in str(path)) < 5e6
    assert sum(path.stat().st_size for path in files) < 40e6
    assert not {path.suffix for path in files} - {
        ".py", ".pyi", ".typed", ".yaml", ".json", ".jsonl", ".j2", ".txt", ".md", ".safetensors", ".model"
    }, {path.suffix for path in files}  # fmt: skip
