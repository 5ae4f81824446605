"""Verbs about rewards and sets of images: score, measure, rewards."""

from pathlib import Path
from typing import Annotated

import typer

from diffalign.cli.errors import plain_errors
from diffalign.cli.help import examples

verbs = typer.Typer()

# Options whose words take several lines, or that both verbs have.
PromptFrom = Annotated[
    str,
    typer.Option(
        help="Where prompts are: auto (metadata file, else a .txt beside the image, else in the image), metadata, txt, "
        "image, name (that of the file), or none."
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        help="Human choices to compare with: a table that `pairs` reads, ratings (image, rating), a log of votes, or "
        "human or a rater's name for the votes on a dataset."
    ),
]
IntoDataset = Annotated[
    bool, typer.Option("--into-dataset", help="Also write the dataset's scores/LABEL.parquet, which training reads.")
]
BatchSize = Annotated[int, typer.Option(min=1, max=4096, help="Images in one batch.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Engine = Annotated[
    str, typer.Option(help="local, or where a Ray cluster is: ray (this machine or RAY_ADDRESS) or ray://HOST:PORT.")
]


@verbs.command("score", epilog=examples("score"))
def score_images(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES", help="Folders, files, quoted globs, parquet files, dataset folders, or addresses (s3://)."
        ),
    ],
    reward: Annotated[
        list[str],
        typer.Option(
            "--reward",
            "-r",
            help="NAME, NAME:key=value,... or LABEL=NAME:...; NAME may be module:Class. Repeat for several.",
        ),
    ],
    prompt: Annotated[str | None, typer.Option(help="One prompt for all images.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A .jsonl, .csv or .parquet that gives each image its prompt."),
    ] = None,
    prompt_from: PromptFrom = "auto",
    prompt_column: Annotated[
        str | None, typer.Option(help="Column of the prompt; without it: prompt, text or caption.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The .jsonl, .csv or .parquet to write; scores in it are kept."
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write one HTML file: a gallery, or with --against the pairs side by side.")
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Other images of the same prompts: print paired win rates.")
    ] = None,
    labels: Labels = None,
    into_dataset: IntoDataset = False,
    batch_size: BatchSize = 32,
    workers: Annotated[int | None, typer.Option(min=1, max=256, help="Threads that read and decode.")] = None,
    device: Device = "auto",
    engine: Engine = "local",
    actors: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Models on the cluster at most; without it, as many as fit.")
    ] = None,
) -> None:
    """Score images with one or more rewards.

    With --output, the same command scores only what is new or changed.
    """
    with plain_errors(resumes=output is not None):
        from diffalign.stages.score import ScoreRequest, score

        given = ScoreRequest(
            images, reward, prompt, _place(prompts), prompt_from, prompt_column, _place(output), html, against, labels,
            into_dataset, batch_size, workers, device, engine, actors,
        )  # fmt: skip
        code = score(given)
    if code:
        raise typer.Exit(code)


def _place(text: str | None) -> Path | str | None:
    """Return a path, and an address as it is."""
    from diffalign.files.remote import is_address

    return text if text is None or is_address(text) else Path(text)


@verbs.command("measure", epilog=examples("measure"))
def measure_sets(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES", help="As of `score`: folders, files, globs, parquet files, dataset folders."),
    ],
    measure: Annotated[
        list[str],
        typer.Option(
            "--measure",
            "-m",
            help="fid, kid, clip-i, dino, lpips, divided by commas; or one with options: kid:subset_size=500.",
        ),
    ],
    reference: Annotated[
        list[str] | None, typer.Option(help="The images to compare with; lpips needs none. May be given again.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The .json to write.")] = None,
    batch_size: BatchSize = 32,
    device: Device = "auto",
) -> None:
    """Measure a set of images.

    FID, KID, CLIP-I and DINO against a reference, LPIPS within prompts; each with its features and numbers of images.
    """
    with plain_errors():
        from diffalign.stages.measure import MeasureRequest
        from diffalign.stages.measure import measure as measure_images

        measure_images(MeasureRequest(images, measure, reference, output, batch_size, device))


@verbs.command("rewards", epilog=examples("rewards"))
def list_rewards(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Rewards, or module:Class: say more of them.")
    ] = None,
) -> None:
    """List the rewards and what each needs.

    Range, licence, weights and their size, and packages to install. With a NAME, also its columns and options.
    """
    with plain_errors():
        from diffalign.stages.rewards import show_rewards

        show_rewards(names or ())
