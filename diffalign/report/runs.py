"""Read a run's folder for a report; nothing is computed but health, if it was not written."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.errors import DiffalignError
from diffalign.files import dotted_keys, read_json, read_json_lines, reading
from diffalign.files.metric_rows import read_metrics
from diffalign.files.parse import parse_yaml
from diffalign.health import ENDINGS, NOT_FINISHED, Finding, examine, examine_ending
from diffalign.redaction import without_folders

# Settings worth showing first, and their names in the report.
FACTS: dict[str, str] = {
    "model.path": "base model",
    "objective.name": "objective",
    "objective.beta": "beta",
    "tune.kind": "trained",
    "tune.rank": "rank",
    "data.path": "data",
    "train.online.prompts": "prompts that are drawn",
    "train.online.groups": "prompts of a draw",
    "train.online.images_per_prompt": "images of a prompt",
    "train.online.every": "updates on a draw",
    "train.online.rewards": "rewards that are followed",
    "student.steps": "steps of the student",
    "student.sampler": "its sampler",
    "match.guidance": "teacher's guidance",
    "group.size": "size of a group",
    "labels.source": "labels",
    "rewards": "rewards that are followed",
    "method.name": "method",
    "sampler.steps": "sampling steps",
    "sampler.guidance_scale": "guidance",
    "drift.weight": "weight of the drift",
    "optimizer.lr": "learning rate",
    "train.groups_per_step": "groups per step",
    "train.images_per_step": "images per step",
    "seed": "seed",
}
# Keys that differ between runs without meaning anything.
PLACES = ("run_dir", "data.cache_dir", "tracking.trackers", "tracking.project")


@dataclass(frozen=True)
class Run:
    """One run directory. result: its eval.json. findings: as in health.json. config: with dotted keys. draws: online.jsonl."""

    folder: Path
    name: str
    rows: list[dict[str, float]]
    validations: list[dict[str, Any]]
    findings: list[dict[str, Any]]
    result: dict[str, Any] | None
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    draws: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def progress(self) -> str:
        """How far training got, in words: `200 steps`, or `stopped at step 6 of 30`; empty without training."""
        wanted = self.config.get("train.steps")
        if not self.steps:
            return ""
        if any(finding["name"] == NOT_FINISHED for finding in self.findings) and isinstance(wanted, int):
            return f"stopped at step {self.steps} of {wanted}"
        return f"{self.steps} step{'' if self.steps == 1 else 's'}"

    @property
    def health(self) -> tuple[str, str]:
        """What the findings say in a few words, and their tone: "good", "warn" or "bad"; empty without training."""
        if not self.rows:
            return "", ""
        alarms = [str(one["title"]) for one in self.findings if one["level"] == "alarm"]
        notes = [str(one["title"]) for one in self.findings if one["level"] != "alarm"]
        return "; ".join([*alarms, *notes]) or "nothing found", "bad" if alarms else "warn" if notes else "good"

    def facts(self, instead: dict[str, str] | None = None) -> list[tuple[str, str]]:
        """Return (name, value) of the settings worth showing first; `instead` replaces values of the config."""
        config = {**self.config, **(instead or {})}
        unused = {"tune.rank"} if config.get("tune.kind") == "full" else set()
        known = [key for key in FACTS if key not in unused and config.get(key) is not None]
        found = [(FACTS[key], _shown(config[key])) for key in known]
        return [*found, ("steps", str(self.steps))] if self.steps else found


def _shown(value: object) -> str:
    """Return a config value as text; a list of sections as their weights and names."""
    if not (isinstance(value, list) and all(isinstance(one, dict) and "name" in one for one in value)):
        return str(without_folders(str(value)))
    return ", ".join(f"{one['weight']:g} x {one['name']}" if "weight" in one else str(one["name"]) for one in value)


def read_run(folder: Path, result: dict[str, Any] | None = None) -> Run:
    """Read a run directory. Raises DiffalignError if it holds neither metrics nor an evaluation."""
    if not folder.is_dir():
        raise DiffalignError(f"{folder}: no such folder; give the run_dir of a training run")
    rows, result = read_metrics(folder / "metrics.jsonl"), result or _evaluation(folder / "eval.json")
    if not rows and result is None:
        raise DiffalignError(f"{folder} holds neither metrics.jsonl nor eval.json; there is nothing to report")
    validations = _validations(folder / "validation.jsonl")
    findings = _findings(folder / "health.json")
    if findings is None:
        findings = [f.as_dict() for f in examine(rows, validations)]
    path = folder / "config.yaml"
    text, config = "", {}
    if path.is_file():
        with reading(path, mend="restore it from a copy; `config` in a checkpoint's state.json has the same keys"):
            text = path.read_text(encoding="utf-8")
            config = dotted_keys(dict(parse_yaml(text, str(path))))
    if rows:
        findings = _with_ending(findings, examine_ending(rows, config.get("train.steps")))
    draws = _validations(folder / "online.jsonl")
    return Run(folder, folder.resolve().name, rows, validations, findings, result, config, without_folders(text), draws)


def _with_ending(findings: list[dict[str, Any]], ending: list[Finding]) -> list[dict[str, Any]]:
    """Return the findings of health.json with what holds as far as the run has got; a killed run could not write that."""
    kept = [one for one in findings if one["name"] not in ENDINGS]
    known = {one["name"] for one in kept}
    return [*kept, *(one.as_dict() for one in ending if one.name not in known)]


def _validations(path: Path) -> list[dict[str, Any]]:
    """Return the rows of validation.jsonl or online.jsonl, whose scores are lists of numbers, one a prompt."""
    rows = read_json_lines(path)
    for row in rows:
        with reading(path, mend=f"delete the line of step {row['step']}"):
            for values in row["scores"].values():
                math.fsum(value for value in values if value is not None)
    return rows


def _findings(path: Path) -> list[dict[str, Any]] | None:
    mend = "delete it, and the report examines the run again"
    found: list[dict[str, Any]] | None = read_json(path, mend)
    with reading(path, mend=mend):
        for one in found or ():
            one["name"], one["level"], one["step"] + 0, one["title"], one["means"], one["change"]
    return found


def _evaluation(path: Path) -> dict[str, Any] | None:
    mend = "delete it, and `diffalign eval` writes it again"
    found: dict[str, Any] | None = read_json(path, mend, "scores", "images", "prompts", "seeds")
    with reading(path, mend=mend):
        for comparison in (found or {"scores": {}})["scores"].values():
            for kind in ("all", *comparison):
                comparison[kind].keys()
    return found


def differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Return config keys whose values differ between runs, each with its values in the order of the runs."""
    keys = sorted({key for run in runs for key in run.config} - set(PLACES))
    rows = [(key, [str(run.config.get(key, "not there")) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def distinct_names(runs: list[Run]) -> list[str]:
    """Return the folders' names, with as many parent folders as are needed to tell them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({n})" for n, name in enumerate(names, start=1)]  # the same folder twice
