"""Keep, show and compare results: bench.json, with everything that decides whether two results can be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table

from diffalign.bench.measures import Measure, difference
from diffalign.errors import DiffalignError
from diffalign.files import read_json, reading, write_whole
from diffalign.intervals import Interval
from diffalign.terminal import counted, name_cell, number, plain_table

FILE = "bench.json"
FORMAT = 1
PACKAGES = (
    "diffalign", "torch", "diffusers", "transformers", "open_clip_torch", "numpy", "pillow", "torchmetrics", "torch-fidelity",
)  # fmt: skip
MEND = "give a bench.json that `diffalign bench` wrote"
Results = dict[str, Any]


def versions() -> dict[str, str]:
    """Return the versions of the packages that numbers may depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if "diffalign" not in found:  # a checkout that is not installed
        from diffalign.version import __version__

        found["diffalign"] = __version__
    return found


def read_results(path: Path) -> Results:
    """Return the results in a bench.json, or in the folder that holds one. Raises DiffalignError for anything else."""
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise DiffalignError(f"{path}: no such file; {MEND}")
    found = read_json(path, MEND, "model", "sampling", "suites")
    with reading(path, mend=MEND):
        for suite in found["suites"].values():
            measures_of(suite)
            suite["prompts"], suite["judges"], suite["notes"], suite["digest"]
    return dict(found)


def measures_of(suite: Mapping[str, Any]) -> list[Measure]:
    """Return a suite's scores."""
    return [Measure.from_dict(name, found) for name, found in suite["scores"].items()]


def check_same(out: Path, part: str, now: Mapping[str, Any]) -> None:
    """Refuse a folder whose bench.json holds results of another model or other sampling settings.

    part: "model" or "sampling". now: what it is this time. Raises DiffalignError with the first difference.
    """
    if not (out / FILE).is_file():
        return
    before: dict[str, Any] = read_results(out)[part]
    if key := next((k for k in {**now, **before} if before.get(k) != now.get(k)), None):
        raise DiffalignError(
            f"{out / FILE} holds results of {part}.{key}={before.get(key)!r}, not {now.get(key)!r}; choose another out"
        )


def keep_suite(
    out: Path, model: Mapping[str, Any], sampling: Mapping[str, Any], name: str, suite: Mapping[str, Any]
) -> Results:
    """Write a suite's results into `out`/bench.json beside those of other suites, and return all."""
    path = out / FILE
    before = read_results(path)["suites"] if path.is_file() else {}
    results: Results = {
        "format": FORMAT, "model": dict(model), "sampling": dict(sampling), "suites": {**before, name: dict(suite)}
    }  # fmt: skip
    write_whole(path, json.dumps(results, indent=1))
    return results


def interval_of(found: Mapping[str, Any]) -> Interval:
    """Return the interval of a score as it stands in bench.json."""
    return Interval(int(found["prompts"]), found["low"], found["high"])


def results_table(name: str, suite: Mapping[str, Any]) -> Table:
    """Return a suite's scores as a table for a terminal, the headline in bold."""
    drawn = f"{counted(suite['prompts'], 'prompt')} x {counted(suite['images_per_prompt'], 'image')}"
    shown = plain_table("score", "prompts", "value", "95% interval", title=f"{suite['title']} ({name}): {drawn}")
    for place, (score, found) in enumerate(suite["scores"].items()):
        form = f".{found['digits']}f"
        value = number(float("nan") if found["value"] is None else found["value"], form)
        interval = interval_of(found).words(form)
        shown.add_row(name_cell(score), str(found["prompts"]), value, interval, style=None if place else "bold")
    return shown


def reason_against(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Return why a suite's two results cannot be compared, "" if they can."""
    if a["digest"] != b["digest"]:
        return f"other prompts ({a['prompts']} and {b['prompts']})"
    for label in dict.fromkeys([*a["judges"], *b["judges"]]):
        one, other = (side["judges"].get(label, {}) for side in (a, b))
        if key := next((k for k in {**one, **other} if one.get(k) != other.get(k)), None):
            return f"another judge ({label}.{key}: {one.get(key)!r} and {other.get(key)!r})"
    return ""


def notes_on(a: Results, b: Results) -> list[str]:
    """Return a line for each sampling setting that differs."""
    before, now = a["sampling"], b["sampling"]
    return [
        f"{key}: A {before.get(key)!r}, B {now.get(key)!r}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]


def compare_suite(a: Mapping[str, Any], b: Mapping[str, Any], title: str) -> Table:
    """Return B against A for every score that both have, as a table for a terminal."""
    shown = plain_table("score", "prompts", "A", "B", "difference", "95% interval", title=title)
    others = {measure.name: measure for measure in measures_of(b)}
    for place, measure in enumerate(measures_of(a)):
        other = others.get(measure.name)
        shared = len(set(measure.prompts) & set(other.prompts)) if other else 0
        if other is None or not shared:
            continue
        form = f".{measure.digits}f"
        change, interval = difference(measure, other)
        shown.add_row(
            name_cell(measure.name),
            str(shared),
            *(number(side.value(), form) for side in (measure, other)),
            number(change, f"+{form}"),
            interval.words(f"+{form}"),
            style=None if place else "bold",
        )
    return shown


def compare(first: Path, second: Path) -> tuple[list[Table], list[str]]:
    """Return a table for each suite that can be compared, and lines on what cannot or differs.

    Raises DiffalignError if no suite can be compared.
    """
    a, b = read_results(first), read_results(second)
    shared = [name for name in a["suites"] if name in b["suites"]]
    if not shared:
        raise DiffalignError(
            f"{first} has {', '.join(a['suites']) or 'no suite'}, {second} has {', '.join(b['suites']) or 'no suite'}: "
            "there is no suite that both have"
        )
    tables, lines = [], []
    for name in shared:
        one, other = a["suites"][name], b["suites"][name]
        if reason := reason_against(one, other):
            lines.append(f"{name} cannot be compared: {reason}")
        else:
            tables.append(compare_suite(one, other, f"{one['title']} ({name}): A {first}, B {second}"))
            lines += [f"{name}: {note}" for note in dict.fromkeys([*one["notes"], *other["notes"]])]
    if not tables:
        raise DiffalignError("; ".join(lines))
    return tables, [*lines, *(f"sampled otherwise: {note}" for note in notes_on(a, b))]
