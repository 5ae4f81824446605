"""Verbs about judges of images: judge, judge-distributions, judge-eval."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffalign.cli.errors import plain_errors
from diffalign.cli.options import Overrides, Source

if TYPE_CHECKING:
    from diffalign.judge.predict import Thinking

verbs = typer.Typer()

JudgeFolder = Annotated[Path, typer.Argument(metavar="JUDGE", help="A judge's folder, such as RUN/weights.")]
Records = Annotated[Path, typer.Argument(metavar="RECORDS", help="ratings.jsonl or pairs.jsonl.")]
Traces = Annotated[int, typer.Option(min=0, help="Reasoning traces of each image, averaged; 0: the score at once.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="A trace is cut at so many tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="Of the sampling of traces; 0: the likeliest tokens.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images, or traces, at once.")]
DeviceName = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the traces.")]


def _thinking(traces: int, max_tokens: int, temperature: float, batch_size: int) -> "Thinking":
    from diffalign.judge.predict import Thinking

    return Thinking(traces, max_tokens, temperature, batch_size)


@verbs.command("judge")
def train_judge(config: Source, overrides: Overrides = None) -> None:
    """Train a judge of images: a teacher that reasons, or a student that scores at once. The same command goes on."""
    with plain_errors(goes_on=True):
        from diffalign.config import load_judge_config

        checked = load_judge_config(config, overrides or ())
        from diffalign.stages.judge import train_from_config

        train_from_config(checked)


@verbs.command("judge-distributions")
def judge_distributions(
    judge: JudgeFolder,
    records: Records,
    out: Annotated[Path | None, typer.Option(help="The file; without it, distributions.jsonl beside RECORDS.")] = None,
    traces: Traces = 1,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 1.0,
    batch_size: BatchSize = 16,
    device: DeviceName = "auto",
    seed: Seed = 0,
) -> None:
    """Write once what a teacher says about every image: what a student learns from."""
    with plain_errors():
        from diffalign.stages.judge import distributions

        told = _thinking(traces, max_tokens, temperature, batch_size)
        distributions(judge, records, out or records.parent / "distributions.jsonl", told, device, seed)


@verbs.command("judge-eval")
def judge_eval(
    judge: JudgeFolder,
    records: Records,
    out: Annotated[Path | None, typer.Option(help="A .json file with all measures.")] = None,
    traces: Traces = 0,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 1.0,
    batch_size: BatchSize = 16,
    device: DeviceName = "auto",
    seed: Seed = 0,
) -> None:
    """Measure a judge against people: correlations, preference accuracy, calibration, tokens and speed."""
    with plain_errors():
        from diffalign.stages.judge import evaluate_judge

        evaluate_judge(judge, records, out, _thinking(traces, max_tokens, temperature, batch_size), device, seed)
