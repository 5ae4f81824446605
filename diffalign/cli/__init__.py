"""The verbs. Nothing heavy is imported before a verb runs, so `--help` answers at once.

Exit codes: `EXIT_CODES`; 1 with a traceback is a bug.
"""

from typing import Annotated

import typer

from diffalign.cli import bench, data, judge, score, serve, start, testbed, train, vote, vote_export
from diffalign.cli.help import GroupedVerbs
from diffalign.cli.terminal import guard_libraries
from diffalign.version import __version__

EXIT_CODES = (
    "Exit codes: 0 success. 1 `doctor` found a problem. 2 a mistake that you can mend, in one line. 3 `score` ended, but "
    "some image has no score. "
    "75 stopped by SIGTERM, Ctrl-C or SIGUSR1 after the current step or batch, which is saved: run the same command again. "
    "130 stopped at once by Ctrl-C.\n\nThe line of a mistake ends with a code, such as [DA102]: docs/errors.md explains each."
)

app = typer.Typer(
    name="diffalign",
    cls=GroupedVerbs,
    help="Make text-to-image diffusion and rectified-flow models follow preferences.\n\n`diffalign VERB --help` says more "
    "of each verb, with examples.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    guard_libraries()
    if version:
        print(f"diffalign {__version__}")
        raise typer.Exit


for verbs in (
    start.verbs,
    train.verbs,
    score.verbs,
    serve.verbs,
    data.verbs,
    judge.verbs,
    vote.verbs,
    vote_export.verbs,
):
    app.add_typer(verbs)
app.add_typer(bench.bench, name="bench")
app.add_typer(start.config, name="config")
app.add_typer(data.data, name="data")
app.add_typer(testbed.testbed, name="testbed")
