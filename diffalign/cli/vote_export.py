"""Verbs about votes that are given: vote-export."""

from pathlib import Path
from typing import Annotated

import typer

from diffalign.cli.errors import plain_errors
from diffalign.cli.help import examples
from diffalign.cli.vote import Sources

verbs = typer.Typer()


@verbs.command("vote-export", epilog=examples("vote-export"))
def vote_export(
    sources: Sources,
    out: Annotated[
        Path,
        typer.Option(
            help="A .csv or .jsonl of choices, for `pairs` and `score --labels`; or a folder, for `judge`: scores of rubric "
            "questions."
        ),
    ],
    rater: Annotated[list[str] | None, typer.Option(help="Whose votes; may be given again. Without it: all.")] = None,
    votes: Annotated[Path | None, typer.Option(help="The file of votes, where `vote` was given one.")] = None,
) -> None:
    """Write votes as a table or as data for judges."""
    with plain_errors():
        from diffalign.stages.vote_export import export_votes

        export_votes(sources, out, rater or (), votes)
