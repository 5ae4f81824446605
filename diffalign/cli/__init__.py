"""The verbs. Nothing heavy is imported before a verb runs, so `--help` answers at once.

Exit codes: 0 success; 2 a mistake that the user can mend, in one line on stderr; 3 `score` ended, but some image has no
score; 130 stopped by Ctrl-C; 1 with a traceback is a bug.
"""

from typing import Annotated

import typer

from diffalign import __version__
from diffalign.cli import data, judge, score, testbed, train
from diffalign.cli.terminal import guard_libraries

app = typer.Typer(
    name="diffalign",
    help="Make text-to-image diffusion and rectified-flow models follow preferences.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    guard_libraries()
    if version:
        print(f"diffalign {__version__}")
        raise typer.Exit


for verbs in (train.verbs, score.verbs, data.verbs, judge.verbs):
    app.add_typer(verbs)
app.add_typer(data.data, name="data")
app.add_typer(testbed.testbed, name="testbed")
