"""Read what a run has written."""

from __future__ import annotations

import json
from pathlib import Path


def rows(run_dir: Path) -> list[dict[str, float]]:
    """Return the rows of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def tree(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file under a folder by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
