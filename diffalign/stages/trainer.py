"""The end of every trainer's stage: the run, its report, and where things are."""

from collections.abc import Sequence
from pathlib import Path

from diffalign.config import RunConfig
from diffalign.health import Finding
from diffalign.progress import say
from diffalign.report.render import write_report
from diffalign.training.run import Method, TrainResult, run
from diffalign.training.same_run import Resolved
from diffalign.training.validation import Validation


def run_and_report(
    config: RunConfig,
    method: Method,
    *,
    validation: Validation | None = None,
    findings: Sequence[Finding] = (),
    report: bool = True,
    resolved: Resolved | None = None,
) -> TrainResult:
    """Run a method to its end, write the run's report, and say where weights and report are.

    A run that fails or that an alarm stops has a report too, where it has logged a row: there one sees why. Its own error is
    what a user reads, whatever becomes of the report. report: False for runs whose curves the report does not know. resolved:
    as `run` takes it.
    """
    main, run_dir = method.accelerator.is_main_process, Path(config.run_dir)
    try:
        result = run(config, method, say=say, validation=validation, findings=findings, resolved=resolved)
    except BaseException:  # also Ctrl-C: what the run did so far is reported
        if main and report and _has_rows(run_dir):
            try:
                write_report(run_dir)
            except Exception as error:  # what ended the run counts, whatever hinders its report
                say(f"report:  not written ({error})")
        raise
    if main:
        say(f"weights: {run_dir / 'weights'}")
        if report:
            say(f"report:  {write_report(run_dir)}")
    return result


def _has_rows(run_dir: Path) -> bool:
    """Return whether the run has logged anything to report."""
    metrics = run_dir / "metrics.jsonl"
    return metrics.is_file() and metrics.stat().st_size > 0
