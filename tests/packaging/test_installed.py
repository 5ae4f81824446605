"""What is installed: the mapped packages, their data files, and that a stranger's folders never shadow them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import pytest

import diffalign

ROOT = Path(__file__).resolve().parents[2]
SITE = os.environ.get("DIFFALIGN_SITE")
"""Where `make wheel-test` has unpacked the wheel; unset in a checkout."""
MAPPED = ("rewards", "pipelines", "configs")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_right_installation_is_under_test() -> None:
    expected = Path(SITE) if SITE else ROOT
    assert Path(diffalign.__file__) == expected / "diffalign" / "__init__.py"
    for name in MAPPED:
        spec = importlib.util.find_spec(f"diffalign.{name}")
        folder = expected / "diffalign" / name if SITE else ROOT / name
        assert spec is not None and spec.origin == str(folder / "__init__.py")


def test_the_list_of_packages_is_complete() -> None:
    listed = set(project()["tool"]["setuptools"]["packages"])
    inside = {
        ".".join(("diffalign", *path.parent.relative_to(ROOT / "diffalign").parts))
        for path in (ROOT / "diffalign").rglob("__init__.py")
    }
    mapped = {
        ".".join(("diffalign", *path.parent.relative_to(ROOT).parts))
        for name in MAPPED
        for path in (ROOT / name).rglob("__init__.py")
    }
    assert listed == inside | mapped


def test_every_data_file_is_shipped() -> None:
    """Every file that is not Python: what no pattern of package-data covers would be absent from the wheel."""
    shipped = Path(str(resources.files("diffalign")))
    folders = {"": ROOT / "diffalign", **{name: ROOT / name for name in MAPPED}}
    for name, folder in folders.items():
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc") and path.name != ".gitkeep":
                relative = Path(name) / path.relative_to(folder)
                assert not SITE or (shipped / relative).is_file(), f"{relative} is not in the wheel"
                if not SITE:
                    assert matches_package_data(relative), f"no pattern of package-data covers {relative}"


def matches_package_data(relative: Path) -> bool:
    for package, patterns in project()["tool"]["setuptools"]["package-data"].items():
        folder = Path(*package.split(".")[1:])
        if relative.is_relative_to(folder):
            inner = relative.relative_to(folder)
            for pattern in patterns:
                suffix_matches = inner.match(pattern.rsplit("/", 1)[-1])
                depth_matches = "**" in pattern or len(inner.parts) == len(Path(pattern).parts)
                prefix = pattern.split("**")[0].rstrip("/") if "**" in pattern else str(Path(pattern).parent)
                if suffix_matches and depth_matches and (prefix in ("", ".") or inner.is_relative_to(prefix)):
                    return True
    return False


def test_nothing_generic_at_the_top() -> None:
    if SITE:
        names = {path.name for path in Path(SITE).iterdir()} - {"bin", ".built", "__pycache__"}
        assert {name for name in names if not name.endswith(".dist-info")} == {"diffalign"}
    scripts = {entry.name: entry.value for entry in metadata.distribution("diffalign").entry_points}
    assert scripts["diffalign"] == "diffalign.__main__:main"


def test_the_version_is_one() -> None:
    assert metadata.version("diffalign") == diffalign.__version__


@pytest.mark.parametrize("safe_path", [True, False])
def test_a_users_own_folders_do_not_shadow_ours(tmp_path: Path, safe_path: bool) -> None:
    for name in MAPPED:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the user's folder was imported')")
    code = "import diffalign.rewards as r, diffalign.configs as c; print(r.__name__, c.__name__)"
    options = ["-P"] if safe_path else []
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "diffalign.rewards diffalign.configs\n", done.stderr


def test_an_unrelated_project_around_a_copy_is_left_alone(tmp_path: Path) -> None:
    """A copy of the package inside another project must not take that project's `rewards/` for its own."""
    (tmp_path / "diffalign").mkdir()
    for name in ("__init__.py", "version.py"):
        shutil.copy(ROOT / "diffalign" / name, tmp_path / "diffalign")
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").touch()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "something-else"\n')
    code = "import diffalign; print(list(diffalign.__path__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == f"{[str(tmp_path / 'diffalign')]}\n", done.stderr


def test_the_licence_is_named() -> None:
    assert project()["project"]["license"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")
