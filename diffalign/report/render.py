"""`report.html`: what was run, how it went, what changed. One file for one run or for several; no network."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from diffalign import __version__
from diffalign.report.curves import CHARTS, series, static_svg
from diffalign.report.images import comparisons, strip, trials
from diffalign.report.runs import Run, differences, distinct_names, read_run

PAIRS_SHOWN = 12
# The chart on which a finding is marked, by the finding's name.
MARKED_ON: dict[str, str] = {
    "accuracy_stuck": "accuracy",
    "beta_too_small": "gradient_factor",
    "winner_rises": "winner_gap",
    "loser_dominates": "loser_gap",
    "margin_saturated": "gradient_factor",
    "gradient_jumps": "grad_norm",
    "loss_diverges": "loss",
    "drift_explodes": "drift",
    "reward_below_base": "validation",
    "drift_without_reward": "validation",
    "labels_without_spread": "share_without_preference",
}


def validation_mean(row: dict[str, Any]) -> float | None:
    """Mean over prompts of a validation's first column."""
    known = [v for v in next(iter(row["scores"].values())) if v is not None]
    return sum(known) / len(known) if known else None


def _rows(run: Run, name: str) -> list[dict[str, float]]:
    if name != "validation":
        return run.rows
    means = [(row["step"], validation_mean(row)) for row in run.validations]
    return [{"step": step, "validation": mean} for step, mean in means if mean is not None]


def charts(runs: list[Run]) -> list[dict[str, Any]]:
    """Every chart that a run has values for: title, note, series, marks of findings, static SVG."""
    found = []
    for name, (title, note) in CHARTS.items():
        lines = [s for n, run in enumerate(runs) for s in [series(n, name, _rows(run, name))] if s is not None]
        if not lines:
            continue
        marks = [
            {"run": n, "step": finding["step"], "title": finding["title"]}
            for n, run in enumerate(runs)
            for finding in run.findings
            if MARKED_ON.get(finding["name"]) == name
        ]
        data = [{"run": line.run, "x": line.steps, "y": line.values} for line in lines]
        svg = Markup(static_svg(name, lines))
        found.append({"name": name, "title": title, "note": note, "svg": svg, "data": {"lines": data, "marks": marks}})
    return found


def write_reports(
    folders: list[Path], out: Path, *, result: dict[str, Any] | None = None, shown: int = PAIRS_SHOWN
) -> Path:
    """Write one HTML file about the runs in `folders`, side by side where there are several.

    `result`: the evaluation of a single run, where it is at hand. `shown`: images with the largest gains, and as many with
    the largest losses. Raises DiffalignError for a folder that holds nothing to report.
    """
    runs = [read_run(Path(folder), result) for folder in folders]
    names = distinct_names(runs)
    made = [{"members": members, "pictures": comparisons(members, shown)} for members in trials(runs, names)]
    environment = Environment(
        loader=PackageLoader("diffalign.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = charts(runs)
    html = environment.get_template("report.html.j2").render(
        title=" · ".join(names) if len(names) <= 3 else f"{len(names)} runs",
        version=__version__,
        runs=list(zip(names, runs, strict=True)),
        trials=made,
        charts=drawn,
        data={"names": names, "charts": {chart["name"]: chart["data"] for chart in drawn}},
        strips=[(name, strip(run, validation_mean)) for name, run in zip(names, runs, strict=True)],
        differences=differences(runs) if len(runs) > 1 else [],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(html, encoding="utf-8")
    part.replace(out)
    return out


def write_report(run_dir: Path, result: dict[str, Any] | None = None) -> Path:
    """`run_dir`/report.html, from its metrics, config and, if there is one, its evaluation."""
    return write_reports([Path(run_dir)], Path(run_dir) / "report.html", result=result)
