"""What the shell offers when Tab is pressed: recipes, keys of a config, rewards. Only words; files come from the disk."""

import json

import typer


def config_names(incomplete: str) -> list[str]:
    """Return the recipes, and the files and folders, that begin so."""
    from diffalign.config import recipes

    return [name for name in recipes() if name.startswith(incomplete)] + files(incomplete)


def files(incomplete: str) -> list[str]:
    """Return the files and folders that begin so; folders end with a slash."""
    from pathlib import Path

    folder, _, begun = incomplete.rpartition("/")
    where = Path(f"{folder}/") if "/" in incomplete else Path()
    try:
        found = sorted(path for path in where.iterdir() if path.name.startswith(begun))
    except OSError:
        return []
    lead = f"{folder}/" if "/" in incomplete else ""
    return [f"{lead}{path.name}{'/' if path.is_dir() else ''}" for path in found if not path.name.startswith(".")]


def config_keys(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return `key.sub=` of the verb's config, for the keys that begin so."""
    from diffalign.config import KINDS
    from diffalign.config.synonyms import keys_of

    verb = ctx.command_path.partition(" ")[2]
    kind = {"cache": "train", "bench run": "bench", "judge train": "judge"}.get(verb, verb)
    if kind not in KINDS or "=" in incomplete:
        return []
    return [f"{key}=" for key in keys_of(KINDS[kind]) if key.startswith(incomplete)]


def reward_names(incomplete: str) -> list[str]:
    """Return our rewards that begin so."""
    from diffalign.scoring.list_rewards import WRITTEN

    return [name for name in json.loads(WRITTEN.read_text(encoding="utf-8")) if name.startswith(incomplete)]
