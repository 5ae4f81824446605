"""Verbs about rewards: score, rewards."""

from pathlib import Path
from typing import Annotated

import typer

from diffalign.cli.errors import plain_errors

verbs = typer.Typer()


@verbs.command("score")
def score_images(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES...", help="Folders, files, quoted globs, parquet files, datasets of ours."),
    ],
    reward: Annotated[
        list[str],
        typer.Option("--reward", "-r", help="NAME, NAME:key=value,... or LABEL=NAME:...; repeat for several rewards."),
    ],
    prompt: Annotated[str | None, typer.Option(help="One prompt for all pictures.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A .jsonl, .csv or .parquet with a column that names the picture and a prompt.")
    ] = None,
    prompt_from: Annotated[
        str,
        typer.Option(
            help="auto (metadata.jsonl, else a .txt beside the picture), metadata, txt, name (the file's own), or none."
        ),
    ] = "auto",
    prompt_column: Annotated[
        str | None, typer.Option(help="Column of the prompt; without it prompt, text or caption.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .jsonl, .csv or .parquet; only what is new is scored again."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="A gallery: one HTML file, sorted by any reward.")] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Other pictures of the same prompts: paired win rates with intervals.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="Human choices (image_a, image_b, choice) or ratings (image, rating): agreement with them."),
    ] = None,
    into_dataset: Annotated[
        bool,
        typer.Option("--into-dataset", help="Also write the dataset's scores/LABEL.parquet, which training reads."),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in one batch.")] = 32,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that read and decode.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Score pictures with one or more rewards. The same command again scores only what is new or changed."""
    with plain_errors(goes_on=output is not None):
        from diffalign.stages.score import ScoreRequest, score

        given = ScoreRequest(
            images, reward, prompt, prompts, prompt_from, prompt_column, output, html, against, labels, into_dataset,
            batch_size, workers, device,
        )  # fmt: skip
        code = score(given)
    if code:
        raise typer.Exit(code)


@verbs.command("rewards")
def list_rewards() -> None:
    """List the rewards: range, licence, weights and their size, what must be installed."""
    with plain_errors():
        from diffalign.stages.score import show_rewards

        show_rewards()
