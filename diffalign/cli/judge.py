"""Verbs about judges of images: judge, judge-distributions, judge-eval."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffalign.cli.config_verb import DryRun, Overrides, Source, checked_config
from diffalign.cli.errors import plain_errors
from diffalign.cli.groups import DefaultGroup
from diffalign.cli.help import examples

if TYPE_CHECKING:
    from diffalign.judge.predict import Thinking


class JudgeGroup(DefaultGroup):
    """`judge CONFIG` is `judge train CONFIG`."""

    default = "train"


judge = typer.Typer(
    cls=JudgeGroup,
    help="Train a judge of images, or a reward of your taste.\n\n`judge CONFIG` is `judge train CONFIG`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
verbs = typer.Typer()
verbs.add_typer(judge, name="judge")

JudgeFolder = Annotated[Path, typer.Argument(metavar="JUDGE", help="A judge's folder, such as RUN/weights.")]
Records = Annotated[Path, typer.Argument(metavar="RECORDS", help="ratings.jsonl or pairs.jsonl.")]
Traces = Annotated[int, typer.Option(min=0, help="Reasoning traces per image, averaged; 0: score at once.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens at which a trace is cut.")]
Temperature = Annotated[float, typer.Option(min=0, help="Sampling temperature of traces; 0: the likeliest tokens.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images or traces in one batch.")]
DeviceName = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the traces.")]


def _thinking(traces: int, max_tokens: int, temperature: float, batch_size: int) -> "Thinking":
    from diffalign.judge.predict import Thinking

    return Thinking(traces, max_tokens, temperature, batch_size)


@judge.command("train", epilog=examples("judge train"))
def train_judge(config: Source, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train a judge of images.

    A teacher that reasons, or a student that scores at once. The same command resumes where it stopped.
    """
    with checked_config("judge", config, overrides) as checked:
        from diffalign.stages.judge import train_from_config

        train_from_config(checked, dry_run=dry_run)


@judge.command("personal", epilog=examples("judge personal"))
def fit_personal(
    source: Annotated[
        str,
        typer.Argument(metavar="DATASET|CONFIG", help="A dataset folder with votes, or a YAML file that names one."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="source=RATER, features=pickscore, out=FOLDER and more: docs/config.md has all."
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Fit a reward of one person's taste.

    To their choices in a dataset, within seconds. `diffalign score -r personal:weights=FOLDER` uses it.
    """
    with plain_errors():
        from diffalign.errors import DiffalignError

        name, equals, _ = source.partition("=")
        if equals and name.isidentifier():
            raise DiffalignError("judge personal: name the dataset first, as `diffalign judge personal DATA`")
    with checked_config("judge personal", source, overrides) as checked:
        from diffalign.stages.personal import fit

        fit(checked, dry_run=dry_run)


@verbs.command("judge-distributions", epilog=examples("judge-distributions"))
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
    """Write a teacher's scores of images for a student.

    One distribution over the scores per image.
    """
    with plain_errors():
        from diffalign.stages.judge import distributions

        thinking = _thinking(traces, max_tokens, temperature, batch_size)
        distributions(judge, records, out or records.parent / "distributions.jsonl", thinking, device, seed)


@verbs.command("judge-eval", epilog=examples("judge-eval"))
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
    """Compare a judge with human ratings.

    Correlations, preference accuracy, calibration, tokens and speed.
    """
    with plain_errors():
        from diffalign.stages.judge import evaluate_judge

        evaluate_judge(judge, records, out, _thinking(traces, max_tokens, temperature, batch_size), device, seed)
