"""Verbs about datasets: pairs, synth, rank, cache, and the group `data`."""

from pathlib import Path
from typing import Annotated

import typer

from diffalign.cli.errors import plain_errors
from diffalign.cli.options import Overrides, Source

data = typer.Typer(
    help="Datasets: other people's to ours, what is in one, and ours to other forms.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

verbs = typer.Typer()


@verbs.command("pairs")
def pairs(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="CSV | WINNERS LOSERS",
            help="A csv with columns prompt, winner, loser; or two folders of pictures with equal names, "
            "with the caption of a.png in a.txt beside the winner.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The dataset folder to write.")],
) -> None:
    """Turn your own pairs into a dataset that `diffalign train` reads (data.path)."""
    with plain_errors():
        from diffalign.data.convert import import_pairs

        print(f"{import_pairs(sources, out).groups} pairs in {out}; train on them with data.path={out}")


@verbs.command()
def synth(
    config: Source,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Time a batch of every generator and reward, print time, disk and cost, stop."),
    ] = False,
) -> None:
    """Make a ranked dataset from prompts. The same command goes on where it stopped; several share the work."""
    with plain_errors(goes_on=True):
        from diffalign.config import load_synth_config

        checked = load_synth_config(config, overrides or ())
        from diffalign.stages import synth as synth_stage

        synth_stage.synth(checked, dry_run=dry_run)


@verbs.command("rank")
def rank_scores(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DATASET|CONFIG", help="A scored dataset folder, or a YAML file with data and the rest."
        ),
    ],
    overrides: Overrides = None,
) -> None:
    """Turn stored scores into preferences anew: other rewards, near-ties dropped, k of K images, filters, splits."""
    with plain_errors(goes_on=True):
        from diffalign.config import load_rank_config

        checked = load_rank_config(source, overrides or ())
        from diffalign.stages import synth as synth_stage

        synth_stage.rank_again(checked)


@verbs.command("cache")
def encode_cache(
    config: Source,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print how many gigabytes it takes and whether they are free; stop.")
    ] = False,
) -> None:
    """Encode the images and prompts of a training config now, so that `diffalign train` starts at once."""
    with plain_errors(goes_on=True):
        from diffalign.config import load_config

        checked = load_config(config, overrides or ())
        from diffalign.stages import data as data_stage

        data_stage.cache(checked, dry_run=dry_run)


@data.command("convert")
def data_convert(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCE...", help="A file or folder; or two folders: winners, then losers.")
    ],
    out: Annotated[Path, typer.Option(help="The dataset folder to write.")],
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="pickapic, hpdv2, hpdv3, hpdv3pp, imagefolder, w_l, csv or two_folders; found out if not given.",
        ),
    ] = None,
) -> None:
    """Turn a dataset that exists already into one that every command here reads. Broken rows are named and left out."""
    with plain_errors():
        from diffalign.stages import data as data_stage

        data_stage.convert(sources, out, form)


@data.command("inspect")
def data_inspect(
    dataset: Annotated[Path, typer.Argument(help="A dataset folder.")],
    html: Annotated[Path | None, typer.Option(help="Write a contact sheet: images from best to worst.")] = None,
    groups: Annotated[int, typer.Option(min=1, help="How many prompts the contact sheet shows.")] = 100,
) -> None:
    """What a dataset holds: sizes, ties, generators, scores, and how far its rewards agree."""
    with plain_errors():
        from diffalign.stages import data as data_stage

        data_stage.inspect(dataset, html, groups)


@data.command("export")
def data_export(
    dataset: Annotated[Path, typer.Argument(help="A dataset folder.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    form: Annotated[
        str, typer.Option("--format", help="rows (one a prompt), pickapic (pairs) or webdataset.")
    ] = "rows",
    pairs: Annotated[str, typer.Option(help="pickapic: best_worst (one pair a prompt) or all.")] = "best_worst",
) -> None:
    """Write a dataset in a form that other code reads, with a card."""
    with plain_errors():
        from diffalign.stages import data as data_stage

        data_stage.export_data(dataset, out, form, pairs)
