"""Each of the speed benchmarks writes its part of results/speed-DEVICE.json, and all parts as tables into speed-DEVICE.md."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"
AIMS = {
    "common / ours": "at least 1.2",
    "ours / bare": "at most 1.10",
    "stored / step": "at most 0.80",
    "diffalign --help": "0.5",
    "train, first step": "12",
}


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"


def results_path(folder: Path = RESULTS) -> Path:
    """Return this device's file with all figures."""
    name = device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    return folder / f"speed-{name}.json"


def keep(part: str, found: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Put a part into this device's files, beside the others; returns the one with all figures."""
    path = results_path(folder)
    known = json.loads(path.read_text()) if path.is_file() else {}
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    known[part] = {"device": device_name(), **versions, **found}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1) + "\n")
    path.with_suffix(".md").write_text(tables(known))
    return path


def tables(document: dict[str, Any]) -> str:
    """All parts that there are, as markdown."""
    writers = {"step": _step, "start": _start, "sampling": _sampling, "grid": _grid}
    lines = ["Written by the benchmarks of docs/speed.md; not edited by hand."]
    for part, write in writers.items():
        if part in document:
            found = document[part]
            lines += ["", f"## {part.capitalize()}", ""]
            lines += [f"{found['device']}, {found['threads']} threads, torch {found['torch']}.", "", *write(found)]
    return "\n".join(lines) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _step(found: dict[str, Any]) -> list[str]:
    ratios = [[name, f"{value:.3f}", AIMS.get(name, "")] for name, value in found["ratios"].items()]
    return [
        f"{found['model']}, {found['side']} px, {found['pairs']} pairs a step, medians of {found['rounds']} rounds.",
        "",
        *_table(["step", "seconds"], [[name, f"{value:.3f}"] for name, value in found["seconds"].items()]),
        "",
        *_table(["ratio within a round", "median", "aim"], ratios),
        "",
        *_table(["FLOPs", "ratio"], [[name, f"{value:.3f}"] for name, value in found["flops"].items()]),
    ]


def _start(found: dict[str, Any]) -> list[str]:
    rows = [[name, f"{value:.2f}", AIMS.get(name, "")] for name, value in found["seconds"].items()]
    return [f"Medians of {found['repeat']}.", "", *_table(["until", "seconds", "aim"], rows)]


def _sampling(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in found["models"].items():
        rate = row["images_per_second"]
        rows.append([name, f"{rate['bare']:.2f}", f"{rate['ours']:.2f}", f"{row['ours / bare']:.3f}"])
    head = ["model", "bare pipeline, images/s", "ours, images/s", "ours / bare, images/s"]
    what = f"{found['images']} images in batches of {found['batch']}, {found['steps']} steps"
    return [f"{what}, medians of {found['rounds']} rounds.", "", *_table(head, rows)]


def _grid(found: dict[str, Any]) -> list[str]:
    rows = []
    for row in found["rows"]:
        settings = ", ".join(f"{key}={value}" for key, value in row["settings"].items()) or "none"
        line = [
            row["model"],
            row["objective"],
            row["tune"],
            str(row["side"]),
            f"{row['groups']} x {row['images']}",
            settings,
        ]
        if "failed" in row:
            rows.append([*line, row["failed"], *[""] * 6])
            continue
        teraflop = ", ".join(f"{phase} {value:.3g}" for phase, value in row["teraflop"].items())
        peak, predicted = row["peak_gib"], row["predicted_peak_gib"]
        rate, share = row["model_teraflops_per_second"], row["fraction_of_ceiling"]
        rows.append([
            *line, f"{row['steps_per_second']:.3f}", f"{row['images_per_second']:.2f}",
            f"{rate:.3f}" if rate else "not counted", f"{share:.0%}" if share else "", teraflop,
            ", ".join(f"{phase} {value:.2f}" for phase, value in peak.items()), f"{predicted:.2f}",
        ])  # fmt: skip
    head = ["model", "objective", "tune", "px", "groups x images", "settings", "steps/s", "images/s", "model TFLOP/s"]
    head += ["of the ceiling", "TFLOP a step", "peak GiB", "predicted GiB"]
    memory = "all that is allocated" if found["whole_memory"] else "what a step makes, without weights and optimiser"
    ceiling = f"{found['ceiling_teraflops']:.3f} TFLOP/s in {found['dtype'].removeprefix('torch.')}"
    return [f"Matrix product: {ceiling}. Peaks: {memory}.", "", *_table(head, rows)]
