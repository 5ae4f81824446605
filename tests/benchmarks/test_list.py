"""The list of benchmarks: each has a question, its command and a row of the README, and imports only what there is."""

from __future__ import annotations

import ast
import importlib.util
import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAMS: dict[str, str] = runpy.run_path(str(BENCHMARKS / "__main__.py"))["programs"]()
ROWS = [line for line in (BENCHMARKS / "README.md").read_text().splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_benchmark_is_described(name: str) -> None:
    assert PROGRAMS[name].endswith("?")
    assert f"python benchmarks/{name}.py" in (BENCHMARKS / f"{name}.py").read_text()
    assert len([row for row in ROWS if row.startswith(f"| `{name}` | {PROGRAMS[name]} |")]) == 1


def test_the_readme_has_no_other_rows() -> None:
    assert len(ROWS) == len(PROGRAMS)


@pytest.mark.parametrize("path", sorted(BENCHMARKS.rglob("*.py")), ids=lambda p: p.relative_to(BENCHMARKS).as_posix())
def test_imports_from_diffalign_exist(path: Path) -> None:
    """Also those within functions: benchmarks run for hours, and rarely."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "diffalign":
            for alias in node.names:
                module = importlib.import_module(str(node.module))
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
