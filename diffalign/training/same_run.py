"""Whether a checkpoint belongs to the run that a config describes."""

from pathlib import Path

from diffalign.config.model import complete_keys
from diffalign.errors import DiffalignError
from diffalign.files import dotted_keys
from diffalign.training.protocols import PlainConfig

# Keys that a resumed run may change; all others would make it another run.
FREE_KEYS = (
    "kind",  # runs from before there was this key have none
    "run_dir",
    "tracking",
    "checkpoint",
    "validation.patience",
    "on_alarm",
    "train.log_every",
    "train.steps",
    "model.token",
    "data.cache_dir",
    "reference",
    "train.images_per_pass",
)


def check_same_run(path: Path, stored: PlainConfig, config: PlainConfig) -> None:
    """Refuse to resume from the checkpoint `path` of another config: raise DiffalignError that names what differs."""
    before, now = dotted_keys(complete_keys(stored)), dotted_keys(complete_keys(config))
    different = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == free or key.startswith(free + ".") for free in FREE_KEYS)
    ]
    # A schedule's shape depends on the number of steps; a run with a constant rate may be made longer.
    scheduled = now.get("optimizer.schedule") != "constant" or any(
        now.get(key, "all") != "all" for key in ("selection.groups", "selection.images")
    )
    if before.get("train.steps") != now.get("train.steps") and scheduled:
        different.append("train.steps")
    if different:
        key = different[0]
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        raise DiffalignError(
            f"{path} belongs to another config: {key} was {before.get(key)!r}, is now {now.get(key)!r}{more}; "
            "choose another run_dir, or restore the old value to resume"
        )
