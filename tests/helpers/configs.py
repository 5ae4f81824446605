"""Small configs, and what kind of config a recipe is."""

from __future__ import annotations

from pathlib import Path

import yaml

from diffalign.config import config_path

SMALL = "run_dir: runs/x\nmodel: {path: m}\ndata: {path: d}\n"


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def kind_of(name: str) -> str:
    return str(yaml.safe_load(config_path(name).read_text(encoding="utf-8"))["kind"])
