"""Verbs about models and runs: train, distill, reward-gradient, sample, eval, rounds, report, export."""

from pathlib import Path
from typing import Annotated

import typer

from diffalign.cli.config_verb import DryRun, Overrides, Rewards, Source, checked_config, reward_overrides
from diffalign.cli.errors import plain_errors
from diffalign.cli.help import examples
from diffalign.progress import say

verbs = typer.Typer()


@verbs.command(epilog=examples("train"))
def train(config: Source, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train a model on preference data.

    The same command resumes where it stopped. With --dry-run: the resolved config, facts about model and data, the number
    of epochs and the memory that the run needs.
    """
    with checked_config("train", config, overrides) as checked:
        from diffalign.stages.train import train

        train(checked, dry_run=dry_run)


@verbs.command(epilog=examples("distill"))
def distill(config: Source, overrides: Overrides = None, reward: Rewards = None, dry_run: DryRun = False) -> None:
    """Distil a model into a few-step student.

    By DMD2 or GNDM, with rewards if the config names some. The same command resumes where it stopped. With --dry-run: the
    resolved config, the student's times and the number of updates.
    """
    with checked_config("distill", config, [*(overrides or ()), *reward_overrides("distill", reward)]) as checked:
        from diffalign.stages.distill import distill

        distill(checked, dry_run=dry_run)


@verbs.command(epilog=examples("reward-gradient"))
def reward_gradient(
    config: Source, overrides: Overrides = None, reward: Rewards = None, dry_run: DryRun = False
) -> None:
    """Train a model on the gradient of rewards.

    By ReFL, DRaFT or AlignProp; the rewards must be differentiable. The same command resumes where it stopped. With
    --dry-run: the resolved config, and which sampling steps carry a gradient.
    """
    with checked_config(
        "reward-gradient", config, [*(overrides or ()), *reward_overrides("reward-gradient", reward)]
    ) as checked:
        from diffalign.stages.reward_gradient import reward_gradient

        reward_gradient(checked, dry_run=dry_run)


@verbs.command(epilog=examples("sample"))
def sample(
    config: Source,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    images: Annotated[
        Path | None, typer.Option(help="Also write every image as a file into this folder, to look at.")
    ] = None,
) -> None:
    """Draw images for prompts into a dataset folder.

    Several images per prompt make a group. The same command resumes where it stopped.
    """
    with checked_config("sample", config, overrides) as checked:
        from diffalign.stages.sample import sample

        sample(checked, images, dry_run=dry_run)


@verbs.command("eval", epilog=examples("eval"))
def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|RUN", help="A YAML file, or the directory of a training run (then give prompts=... too)."
        ),
    ],
    overrides: Overrides = None,
    reward: Rewards = None,
    dry_run: DryRun = False,
) -> None:
    """Compare trained weights with the base model.

    Both draw images of the same prompts at the same seeds, the rewards score them, and report.html shows the differences.
    """
    with checked_config("eval", source, [*(overrides or ()), *reward_overrides("eval", reward)]) as checked:
        from diffalign.stages.evaluate import evaluate

        evaluate(checked, dry_run=dry_run)


@verbs.command(epilog=examples("rounds"))
def rounds(config: Source, overrides: Overrides = None, reward: Rewards = None, dry_run: DryRun = False) -> None:
    """Sample, score, rank, train and evaluate in rounds.

    Each round draws its training images from the model of the round before. The same command resumes where it stopped.
    """
    with checked_config("rounds", config, [*(overrides or ()), *reward_overrides("rounds", reward)]) as checked:
        from diffalign.stages.rounds import rounds

        rounds(checked, dry_run=dry_run)


@verbs.command("report", epilog=examples("report"))
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories; several stand side by side.")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file; without it, RUN/report.html, or report.html here for several.")
    ] = None,
    images: Annotated[
        int, typer.Option(min=1, help="Number of images with the largest gains, and with the largest losses.")
    ] = 12,
) -> None:
    """Write an HTML report about one run or several.

    One self-contained file: curves, health findings, scores and images.
    """
    with plain_errors():
        from diffalign.report.render import write_reports

        target = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
        say(f"report: {write_reports(runs, target, shown=images)}")


@verbs.command("export", epilog=examples("export"))
def export_weights(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A training run's directory, or RUN/checkpoints/step-N.")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="weights: a LoRA as two files, for diffusers and for ComfyUI, A1111, Forge and sd-scripts; or the trunk's "
            "folder if all weights were trained. diffusers, kohya: one of the two. merged: the whole pipeline with the LoRA "
            "in it. single-file: the same as one checkpoint file, for ComfyUI and A1111.",
        ),
    ] = "weights",
    out: Annotated[Path | None, typer.Option(help="The folder to write; without it, RUN/export/FORMAT.")] = None,
    best: Annotated[bool, typer.Option("--best", help="The weights of the best validation, not the last.")] = False,
    dtype: Annotated[
        str, typer.Option(help="Number type of a merged model or a single file: float32, float16 or bfloat16.")
    ] = "float32",
    licence: Annotated[
        str | None, typer.Option(help="The licence in the model card, as the hub names it; without it, the base's.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="The base model's name on the hub, if the run read it from a folder."),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload to this hub repository, with HF_TOKEN or your login."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private if it is new.")] = False,
) -> None:
    """Write a run's weights for other programs.

    With a model card, and uploaded to the hub with --push.
    """
    with plain_errors():
        from diffalign.stages.export import export

        target = out or run / "export" / form
        export(run, target, form, best=best, dtype=dtype, licence=licence, base=base, push=push, private=private)
