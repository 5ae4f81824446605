"""The verb that puts rewards behind an address: serve."""

from enum import StrEnum
from typing import Annotated

import typer

from diffalign.cli.errors import plain_errors
from diffalign.cli.help import examples

verbs = typer.Typer()


class Resident(StrEnum):
    """Which models stay in memory."""

    all = "all"
    one = "one"


@verbs.command("serve", epilog=examples("serve"))
def serve_rewards(
    reward: Annotated[
        list[str],
        typer.Option("--reward", "-r", help="NAME, NAME:key=value,... or LABEL=NAME:..., as `score` takes it. Repeat."),
    ],
    host: Annotated[str, typer.Option(help="Where to listen; another host than this machine's own needs a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            help="What clients must send; better in DIFFALIGN_TOKEN. Without it a random one on another host."
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name of this machine that clients use, as behind a proxy.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Images in one batch, of all clients.")] = 32,
    resident: Annotated[
        Resident, typer.Option(help="Models in memory: all, or one at a time, loaded when it is asked for.")
    ] = Resident.all,
    queue: Annotated[
        int, typer.Option(min=1, help="Images that may wait; beyond that clients are asked to return.")
    ] = (4096),
    workers: Annotated[int | None, typer.Option(min=1, max=256, help="Threads that decode.")] = None,
    body: Annotated[int, typer.Option(min=1, max=1024, help="MiB of one request.")] = 64,
    drain: Annotated[int, typer.Option(min=0, help="Seconds for the last requests after SIGTERM or Ctrl-C.")] = 30,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Serve rewards to trainers and others over HTTP.

    Clients: `reward: {name: remote, url: http://HOST:PORT/NAME}` in any config, `-r remote:url=...` of `score`, or JSON.
    """
    with plain_errors():
        from diffalign.stages.serve import ServeRequest, Settings, decoding_threads, serve

        chosen = Settings(batch_size, resident=resident.value, queue=queue, workers=workers or decoding_threads())
        serve(ServeRequest(reward, host, port, token, tuple(allow_host or ()), device, chosen, body, drain))
