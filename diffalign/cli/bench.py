"""The group `bench`: judge a model by published suites, compare two results, list the suites."""

from pathlib import Path
from typing import Annotated

import typer

from diffalign.cli.config_verb import DryRun
from diffalign.cli.errors import plain_errors
from diffalign.cli.groups import DefaultGroup
from diffalign.cli.help import examples


class BenchGroup(DefaultGroup):
    """`bench MODEL` is `bench run MODEL`."""

    default = "run"


bench = typer.Typer(
    cls=BenchGroup,
    help="Judge a model by published suites.\n\nGenEval, DPG-Bench, HPSv2 and others. `bench MODEL` is `bench run MODEL`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@bench.command("run", epilog=examples("bench run"))
def run(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A run directory, or a model: a folder, a file, a hub id or shapes-sd3."),
    ],
    task: Annotated[
        list[str],
        typer.Option("--task", "-t", help="NAME or NAME:PATH of suites, divided by commas; may be given again."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY.SUB=VALUE", help="How images are drawn, such as steps=50 model.dtype=bfloat16."),
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            "--judge", "-j", help="LABEL:key=value changes a judge of the suites, LABEL=REWARD:... replaces it."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A folder with the prompts of each suite in a folder of its name.")
    ] = None,
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Only so many prompts of each suite: a try, not the protocol.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Draw the images of suites and judge them.

    Prints the suites' own scores with intervals. Writes bench.json, bench.html and the images. The same command resumes
    where it stopped; other suites are added.
    """
    with plain_errors(resumes=True):
        from diffalign.config import bench_config

        config = bench_config(model, overrides or ())
        from diffalign.stages.bench import BenchRequest
        from diffalign.stages.bench import bench as judge_suites

        judge_suites(config, BenchRequest(task, judge or [], data, n, dry_run))


@bench.command("compare", epilog=examples("bench compare"))
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A bench.json, or the folder that holds it.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another, of the same prompts and judges.")],
) -> None:
    """Compare two results.

    B less A for every score, with paired intervals over prompts.
    """
    with plain_errors():
        from diffalign.bench.show import compare_results

        compare_results(first, second)


@bench.command("suites", epilog=examples("bench suites"))
def suites() -> None:
    """List the suites.

    How many prompts and images, what judges them, and where the prompts are to be had.
    """
    with plain_errors():
        from diffalign.bench.show import show_suites

        show_suites()
