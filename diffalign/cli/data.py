"""Verbs about datasets: pairs, synth, rank, cache, and the group `data`."""

from pathlib import Path
from typing import Annotated

import typer

from diffalign.cli.config_verb import DryRun, Overrides, Rewards, Source, checked_config, reward_overrides
from diffalign.cli.errors import plain_errors
from diffalign.cli.help import examples

data = typer.Typer(
    help="Convert, inspect and export datasets.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

verbs = typer.Typer()

Split = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=SHARE", help="Hold out this share of the prompts, such as validation=0.1; may be given again."
    ),
]


@verbs.command("pairs", epilog=examples("pairs"))
def pairs(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE",
            help="A csv with columns prompt, winner, loser; or two folders, winners then losers, of images with equal "
            "names, with the caption of a.png in a.txt beside the winner.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The dataset folder to write.")],
    split: Split = None,
) -> None:
    """Make a dataset from your own pairs of images.

    `diffalign train` reads it as data.path.
    """
    with plain_errors():
        from diffalign.stages.data import pairs as write_pairs

        write_pairs(sources, out, split or [])


@verbs.command(epilog=examples("synth"))
def synth(config: Source, overrides: Overrides = None, reward: Rewards = None, dry_run: DryRun = False) -> None:
    """Make a ranked dataset from prompts.

    Generators draw images, rewards score them, and the scores become preferences. The same command resumes where it
    stopped, and several processes share the work. With --dry-run: draw and score a batch or two, and print the time, disk
    and cost of all.
    """
    with checked_config("synth", config, [*(overrides or ()), *reward_overrides("synth", reward)]) as checked:
        from diffalign.stages.synth import synth

        synth(checked, dry_run=dry_run)


@verbs.command(epilog=examples("rank"))
def rank(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DATASET|CONFIG", help="A scored dataset folder, or a YAML file that names one under data."
        ),
    ],
    overrides: Overrides = None,
    reward: Rewards = None,
) -> None:
    """Rank a scored dataset again.

    From stored scores: with other rewards, without near-ties, with k of K images, filters or splits.
    """
    with checked_config("rank", source, [*(overrides or ()), *reward_overrides("rank", reward)]) as checked:
        from diffalign.stages.rank import rank

        rank(checked)


@verbs.command(epilog=examples("cache"))
def cache(config: Source, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Encode a dataset before training.

    Takes the config of `diffalign train`, which then starts at once. With --dry-run: how many gigabytes are needed, and
    whether they are free.
    """
    with checked_config("train", config, overrides) as checked:
        from diffalign.stages.data import cache

        cache(checked, dry_run=dry_run)


@data.command("convert", epilog=examples("data convert"))
def data_convert(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCE", help="A file or folder; or two folders: winners, then losers.")
    ],
    out: Annotated[Path, typer.Option(help="The dataset folder to write.")],
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="pickapic, hpdv2, hpdv3, hpdv3pp, imagefolder, w_l, table or two_folders; without it, guessed.",
        ),
    ] = None,
    split: Split = None,
) -> None:
    """Convert other datasets into one for all verbs here.

    Broken rows are reported and skipped.
    """
    with plain_errors():
        from diffalign.stages.data import convert

        convert(sources, out, form, split)


@data.command("inspect", epilog=examples("data inspect"))
def data_inspect(
    dataset: Annotated[Path, typer.Argument(help="A dataset folder.")],
    html: Annotated[Path | None, typer.Option(help="Write a contact sheet: images from best to worst.")] = None,
    groups: Annotated[int, typer.Option(min=1, help="How many prompts the contact sheet shows.")] = 100,
) -> None:
    """Show what a dataset holds.

    Sizes, ties, generators, scores, and how far its rewards agree.
    """
    with plain_errors():
        from diffalign.stages.data import inspect

        inspect(dataset, html, groups)


@data.command("export", epilog=examples("data export"))
def data_export(
    dataset: Annotated[Path, typer.Argument(help="A dataset folder.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    form: Annotated[
        str, typer.Option("--format", help="rows (one a prompt), pickapic (pairs) or webdataset.")
    ] = "rows",
    pairs: Annotated[str, typer.Option(help="pickapic: best_worst (one pair a prompt) or all.")] = "best_worst",
) -> None:
    """Export a dataset for other programs, with a card."""
    with plain_errors():
        from diffalign.stages.data import export_data

        export_data(dataset, out, form, pairs)
