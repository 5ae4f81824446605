"""Room on a disk, asked for before it is needed."""

import shutil
from pathlib import Path

from diffalign.errors import DiffalignError


def around(folder: Path) -> Path:
    """The nearest folder around a path that is there."""
    return next(parent for parent in (folder, *folder.resolve().parents) if parent.is_dir())


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse what does not fit on the disk of `folder`, which need not be there yet."""
    free = shutil.disk_usage(around(folder)).free
    if needed > free:
        raise DiffalignError(
            f"{what} {folder}: {needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free; free some space, point "
            "data.cache_dir elsewhere, or set data.cache=off"
        )
