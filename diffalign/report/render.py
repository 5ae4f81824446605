"""Write `report.html`: what was run, how it went, what changed. One file for one or several runs; no network."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from diffalign.files import write_whole
from diffalign.intervals import FEWEST, interval_in
from diffalign.report.curves import Series, series, static_svg, titles
from diffalign.report.images import Candidate, comparisons, strip, trials
from diffalign.report.page import render_page
from diffalign.report.runs import Run, differences, distinct_names, read_run

PAIRS_SHOWN = 12
TELLING = {"best": 2, "worst": 1}
"""How many of the largest gains and losses stand on the first screen."""
# The chart on which a finding is marked, by the finding's name.
MARKED_ON: dict[str, str] = {
    "accuracy_stuck": "accuracy",
    "beta_too_small": "gradient_factor",
    "winner_rises": "winner_gap",
    "loser_dominates": "loser_gap",
    "margin_saturated": "gradient_factor",
    "gradient_jumps": "grad_norm",
    "gradient_vanished": "grad_norm",
    "loss_diverges": "loss",
    "drift_explodes": "drift",
    "diversity_falls": "diversity",
    "reward_below_base": "validation",
    "drift_without_reward": "validation",
    "labels_without_spread": "share_without_preference",
    "reference_disagrees": "disagreeing_gap",
}


def _mean(values: list[float | None]) -> float | None:
    """Return the mean of the known values; None if there is none."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def validation_mean(row: dict[str, Any]) -> float | None:
    """Return the mean over prompts of a validation's first column."""
    return _mean(next(iter(row["scores"].values())))


def _rows(run: Run, name: str) -> list[dict[str, float]]:
    if name != "validation":
        return run.rows
    means = [(row["step"], validation_mean(row)) for row in run.validations]
    return [{"step": step, "validation": mean} for step, mean in means if mean is not None]


def over_checkpoints(run: Run) -> dict[str, list[dict[str, float]]]:
    """Return score -> {"step", "score"} of the base, of every evaluated checkpoint (`step-N`) and of the final weights."""
    if run.result is None:
        return {}
    steps = {int(name[5:]): name for name in run.result.get("others", {}) if re.fullmatch(r"step-\d+", name)}
    found = {}
    for column, kinds in run.result["scores"].items() if steps else ():
        at = {0: kinds["all"]["base"], run.steps: kinds["all"]["tuned"]}
        at |= {step: run.result["others"][name][column]["all"]["tuned"] for step, name in steps.items()}
        found[column] = [{"step": step, "score": at[step]} for step in sorted(at)]
    return found


def verdicts(members: Iterable[Candidate]) -> list[dict[str, str]]:
    """Return {"label", "headline", "reason", "tone"} of each candidate: whether its first score is better than the base's.

    The headline claims a difference only where its 95% interval excludes 0.
    """
    found = []
    for candidate in members:
        column, kinds = next(iter(candidate.scores.items()))
        c = kinds["all"]
        interval = interval_in(c)
        reason = f"{column} changed by {c['difference']:+.3f} over {c['prompts']} held-out prompts"
        if interval.low is None:
            reason += f"; at least {FEWEST} are needed for an interval"
        else:
            reason += f", 95% interval {interval.words()}, which {'excludes' if interval.side() else 'holds'} 0"
        headline = interval.verdict("better than the base", "worse than the base")
        found.append({"label": candidate.label, "headline": headline, "reason": f"{reason}.", "tone": interval.tone})
    return found


def mark_telling(rows: list[dict[str, Any]]) -> None:
    """Mark the rows of `comparisons` that stand on the first screen, with "telling": the largest gains and losses.

    Each of another prompt.
    """
    left, seen = dict(TELLING), set()
    for row in rows:
        row["telling"] = left[row["kind"]] > 0 and row["prompt"] not in seen
        if row["telling"]:
            left[row["kind"]] -= 1
            seen.add(row["prompt"])


def headlines(runs: list[Run], names: list[str]) -> list[dict[str, Any]]:
    """Return what a table of several runs says of each: progress, the first score with its verdict, health.

    "score" is None for a run that was not evaluated.
    """
    found = []
    for name, run in zip(names, runs, strict=True):
        words, tone = run.health
        row: dict[str, Any] = {"name": name, "progress": run.progress, "health": words, "tone": tone, "score": None}
        if run.result is not None:
            column, kinds = next(iter(run.result["scores"].items()))
            verdict = interval_in(kinds["all"]).verdict("better", "worse")
            row |= {"score": column, "verdict": verdict, "all": kinds["all"]}
        found.append(row)
    return found


def _over_optimisation(runs: list[Run]) -> list[dict[str, Any]]:
    """Make a chart for each score: if the trained reward still rises while others fall, the run is past its best."""
    scores = [over_checkpoints(run) for run in runs]
    found = []
    for place, column in enumerate(dict.fromkeys(column for one in scores for column in one)):
        lines = [s for n, one in enumerate(scores) for s in [series(n, "score", one.get(column, []))] if s is not None]
        note = "mean over the evaluation's prompts; step 0 is the base. Read it beside drift"
        found.append(_chart(f"over-{place}", f"{column} over checkpoints", note, lines, []))
    return found


def _other_validations(runs: list[Run]) -> list[dict[str, Any]]:
    """Make a chart for the first column of each further validation reward: it shows what a gain costs."""
    columns = [list(run.validations[0]["scores"]) if run.validations else [] for run in runs]
    leading = [column for one in columns for column in {c.split(".")[0]: c for c in reversed(one)}.values()]
    found = []
    for place, column in enumerate(dict.fromkeys(c for c in leading if c not in [one[0] for one in columns if one])):
        lines = []
        for n, run in enumerate(runs):
            rows = [
                {"step": row["step"], "score": mean}
                for row in run.validations
                if column in row["scores"] and (mean := _mean(row["scores"][column])) is not None
            ]
            lines += [line for line in [series(n, "score", rows)] if line is not None]
        note = "mean over prompts that are not trained on; a reward that decides nothing here"
        found += (
            [_chart(f"validation-{place}", f"Validation: {column.split('.')[0]}", note, lines, [])] if lines else []
        )
    return found


def _chart(name: str, title: str, note: str, lines: list[Series], marks: list[dict[str, Any]]) -> dict[str, Any]:
    data = {"lines": [{"run": line.run, "x": line.steps, "y": line.values} for line in lines], "marks": marks}
    return {"name": name, "title": title, "note": note, "svg": Markup(static_svg(name, lines)), "data": data}


def charts(runs: list[Run]) -> list[dict[str, Any]]:
    """Return every chart that a run has values for: title, note, series, marks of findings, static SVG."""
    found = _over_optimisation(runs)
    objectives = [str(run.config["objective.name"]) for run in runs if "objective.name" in run.config]
    for name, (title, note) in titles(objectives).items():
        lines = [s for n, run in enumerate(runs) for s in [series(n, name, _rows(run, name))] if s is not None]
        if not lines:
            continue
        marks = [
            {"run": n, "step": finding["step"], "title": finding["title"]}
            for n, run in enumerate(runs)
            for finding in run.findings
            if MARKED_ON.get(finding["name"]) == name
        ]
        found.append(_chart(name, title, note, lines, marks))
        if name == "validation":
            found += _other_validations(runs)
    return found


def strips(names: list[str], runs: list[Run]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return (title, grids over steps) of every run's validations and draws, without those that have none."""
    found = []
    for name, run in zip(names, runs, strict=True):
        of = f": {name}" if len(runs) > 1 else ""
        found.append((f"Validation over steps{of}", strip(run, run.validations, "step", validation_mean)))
        found.append((f"Images drawn in training{of}", strip(run, run.draws, "drawn", validation_mean)))
    return [(title, grids) for title, grids in found if grids]


def write_reports(
    folders: list[Path], out: Path, *, result: dict[str, Any] | None = None, shown: int = PAIRS_SHOWN
) -> Path:
    """Write one HTML file about the runs in `folders`, side by side if there are several.

    result: the evaluation of a single run, if it is at hand. shown: how many images with the largest gains, and as many
    with the largest losses. Raises DiffalignError for a folder that holds nothing to report.
    """
    runs = [read_run(Path(folder), result) for folder in folders]
    names = distinct_names(runs)
    compared = trials(runs, names)
    made: list[dict[str, Any]] = [{"members": members, "pictures": comparisons(members, shown)} for members in compared]
    for trial in made:
        mark_telling(trial["pictures"])
    tuned = [c for members in compared for c, _ in members if c.model == "tuned"]
    drawn = charts(runs)
    html = render_page(
        "diffalign.report",
        "report.html.j2",
        title=" · ".join(names) if len(names) <= 3 else f"{len(names)} runs",
        runs=list(zip(names, runs, strict=True)),
        headlines=headlines(runs, names),
        trials=made,
        verdicts=verdicts(tuned),
        charts=drawn,
        data={"names": names, "charts": {chart["name"]: chart["data"] for chart in drawn}},
        strips=strips(names, runs),
        differences=differences(runs) if len(runs) > 1 else [],
    )
    write_whole(out, html)
    return out


def write_report(run_dir: Path, result: dict[str, Any] | None = None) -> Path:
    """Write `run_dir`/report.html from its metrics, config and, if there is one, its evaluation."""
    return write_reports([Path(run_dir)], Path(run_dir) / "report.html", result=result)
