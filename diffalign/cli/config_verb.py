"""What verbs with a config share: their arguments, and the config checked before torch is imported.

@verbs.command(epilog=examples("train"))
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

from diffalign.cli.complete import config_keys, config_names, reward_names
from diffalign.cli.errors import plain_errors

Source = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG",
        help="A YAML file, or the name of a shipped recipe; `diffalign recipes` lists them.",
        autocompletion=config_names,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY.SUB=VALUE",
        help="Values that replace those of CONFIG; docs/config.md has all keys.",
        autocompletion=config_keys,
    ),
]
Rewards = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        "-r",
        help="What scores, in the place of CONFIG's: NAME or NAME:key=value,... Repeat for several.",
        autocompletion=reward_names,
    ),
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


REWARD_KEYS = {
    "synth": "rewards",
    "rounds": "data.rewards",
    "distill": "reward.terms",
    "reward-gradient": "rewards",
    "rank": "sources",
}
"""Where the `--reward` options of a verb stand in its config; those of eval are `reward` and `more_rewards`."""


def reward_overrides(kind: str, rewards: Sequence[str] | None) -> list[str]:
    """Return the overrides of a verb's config for its `--reward` options. A mistake in them is one line and exit code 2."""
    if not rewards:
        return []
    with plain_errors():
        from diffalign.errors import DiffalignError
        from diffalign.scoring.spec import parse_all

        specs = parse_all(list(rewards))
        labelled = [one for one in specs if one.label != one.name and ":" not in one.name]
        if labelled:
            raise DiffalignError(
                f"--reward {labelled[0].label}={labelled[0].name}: {kind} takes no labels; write the name"
            )
        if kind == "rank":
            return [f"sources={json.dumps([one.name for one in specs])}"]
        sections = [json.dumps({"name": one.name, "options": one.options}) for one in specs]
        if kind == "eval":
            return [f"reward={sections[0]}", f"more_rewards=[{', '.join(sections[1:])}]"]
        return [f"{REWARD_KEYS[kind]}=[{', '.join(sections)}]"]
    return []
