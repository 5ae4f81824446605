"""Verbs about votes: vote."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from diffalign.cli.errors import plain_errors
from diffalign.cli.help import examples

verbs = typer.Typer()


def _source(text: str) -> Path:
    if not text:  # Path would take it for the current folder, as where a variable of the shell is not set
        raise typer.BadParameter("is empty; name a folder, or . for the current one")
    return Path(text)


Sources = Annotated[
    list[Path],
    typer.Argument(
        metavar="SOURCE",
        parser=_source,
        help="A dataset folder; a folder of images that share prompts; two folders or two runs, paired by prompt; or "
        "one run, its tuned model against its base.",
    ),
]
Votes = Annotated[
    Path | None,
    typer.Option(help="The file of votes; without it, votes.jsonl in the folder, or a file beside two folders."),
]


@verbs.command("vote", epilog=examples("vote"))
def vote(
    sources: Sources,
    rater: Annotated[str, typer.Option(help="The name under which votes are kept.")] = "me",
    n: Annotated[int | None, typer.Option("--n", "-n", min=1, help="Votes that each rater is asked for.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.1, help="Minutes after which nothing more is asked.")] = None,
    images: Annotated[
        int, typer.Option(min=2, max=9, help="Images that are shown at once; more than two are ranked.")
    ] = 2,
    rubric: Annotated[
        str, typer.Option(help="Questions that are scored from 1 to 5 for each image, such as alignment,realism.")
    ] = "",
    votes: Votes = None,
    ask: Annotated[
        Literal["balanced", "random", "active"],
        typer.Option(
            help="Which pairs come first: balanced over prompts and models, random, or the least certain ones."
        ),
    ] = "balanced",
    reward: Annotated[
        str | None,
        typer.Option(
            "--reward",
            "-r",
            help="With --ask active: whose scores say what is certain; stored, or as `score` takes it.",
        ),
    ] = None,
    repeats: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of questions that are asked again, to compare the answers.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of what is asked, and of the sides.")] = 0,
    host: Annotated[
        str, typer.Option(help="Where to listen; other machines need the token that is printed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 8017,
    token: Annotated[str | None, typer.Option(help="A token of your own.", envvar="DIFFALIGN_TOKEN")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further host name that the page may be opened by; may be given again.")
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Vote on images in your browser.

    Two are shown side by side, and you press 1 or 2. Nothing leaves this machine. Each vote is on the disk before the next
    pair is shown; the same command resumes.
    """
    with plain_errors():
        from diffalign.stages.vote import VoteRequest
        from diffalign.stages.vote import vote as serve_votes

        names = tuple(name.strip() for name in rubric.split(",") if name.strip())
        request = VoteRequest(
            sources, rater, images, n, minutes, names, votes, seed, host, port, token, tuple(allow_host or ()), browser,
            ask, reward, repeats,
        )  # fmt: skip
        serve_votes(request)


@verbs.command("vote-results", epilog=examples("vote-results"))
def results(
    sources: Sources,
    rater: Annotated[str, typer.Option(help="Whose votes; human: those of all.")] = "human",
    reward: Annotated[
        list[str] | None,
        typer.Option(
            "--reward", "-r", help="Compare with it, beside the scores that a dataset stores; as `score` takes it."
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with tables, intervals and pairs.")] = None,
    votes: Votes = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Say what came out of votes.

    Win rates of models with intervals, agreement of people and of rewards, answers to repeated questions, and whether sides
    explain votes.
    """
    with plain_errors():
        from diffalign.stages.vote_results import vote_results

        vote_results(sources, votes, reward or (), rater, html, device, seed)
