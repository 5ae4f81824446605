"""Write bench.html: every suite's scores with intervals, what is not as published, and some images. One file, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.bench.results import Results, interval_of
from diffalign.files import write_whole
from diffalign.redaction import without_folders
from diffalign.report.page import render_page

Pictures = Mapping[str, Sequence[tuple[str, str]]]
"""Of each suite (prompt, image as a data URI)."""


def write_page(path: Path, results: Results, pictures: Pictures) -> Path:
    """Write the page and return its path."""
    shown = without_folders(results)
    # The pictures come after: in base64 there are parts that look like folders.
    suites = [
        {**suite, "name": name, "rows": rows_of(suite), "pictures": pictures.get(name, ())}
        for name, suite in shown["suites"].items()
    ]
    write_whole(path, render_page("diffalign.bench", "bench.html.j2", results=shown, suites=suites))
    return path


def rows_of(suite: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a suite's scores in words: name, prompts, value, interval."""
    rows = []
    for name, found in suite["scores"].items():
        form = f".{found['digits']}f"
        value = "–" if found["value"] is None else f"{found['value']:{form}}"
        interval = interval_of(found).words(form)
        rows.append({"name": name, "prompts": str(found["prompts"]), "value": value, "interval": interval})
    return rows
