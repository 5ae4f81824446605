"""What verbs with a config share: their arguments, and the config checked before torch is imported.

@verbs.command()
def train(config: Source, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    \"\"\"Train a model on preference data.\"\"\"
    with checked_config("train", config, overrides) as checked:
        from diffalign.stages.train import train

        train(checked, dry_run=dry_run)
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from diffalign.cli.errors import plain_errors

Source = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped recipe such as sdxl_dpo.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.SUB=VALUE", help="Values that replace those of CONFIG, such as train.steps=200."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what the command would do; write nothing.")]


@contextmanager
def checked_config(kind: str, source: str, overrides: list[str] | None) -> Iterator[Any]:
    """Yield the checked config of a verb; inside the block, a user's mistake is one line and exit code 2.

    The block imports its stage, and with it torch: a mistyped key is reported before that. The config is typed Any since
    its class follows from `kind`, and `--help` would have to import all classes to name them.
    """
    with plain_errors(resumes=True):
        from diffalign import config

        yield config.load_for(kind, source, overrides or ())


def reward_overrides(rewards: Sequence[str]) -> list[str]:
    """Return the overrides of an evaluation for `--reward` options: the first is `reward`, the others are `more_rewards`.

    A mistake in them is one line and exit code 2.
    """
    if not rewards:
        return []
    with plain_errors():
        from diffalign.errors import DiffalignError
        from diffalign.scoring.spec import parse_all

        specs = parse_all(list(rewards))
        labelled = [one for one in specs if one.label != one.name and ":" not in one.name]
        if labelled:
            raise DiffalignError(
                f"--reward {labelled[0].label}={labelled[0].name}: eval takes no labels; write the name"
            )
        sections = [json.dumps({"name": one.name, "options": one.options}) for one in specs]
        return [f"reward={sections[0]}", f"more_rewards=[{', '.join(sections[1:])}]"]
    return []
