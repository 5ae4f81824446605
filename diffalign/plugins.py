"""Find classes of other packages: by entry point, or as `module:Class`.

An installed package offers its classes in its pyproject.toml, in the group of what they are:

    [project.entry-points."diffalign.objectives"]
    hinge = "my_losses:Hinge"

    [project.entry-points."diffalign.rewards"]
    brightness = "my_rewards:Brightness"

Without a package, any module on Python's path will do: the name is then `my_losses:Hinge`. Entry points are read only for a
name that is not ours, and a module is imported only when its class is wanted. Our names win.
"""

import difflib
import importlib
import re
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from diffalign.errors import DiffalignError

REWARD_GROUP = "diffalign.rewards"
"""The entry points by which other packages offer rewards."""
CLASS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""The form of `module:Class`."""


def find_class(name: str, ours: Mapping[str, type], group: str, base: type) -> type[Any]:
    """Return the class that `name` means: one of ours, of an entry point in `group`, or `module:Class`.

    Raises DiffalignError for a name that nobody offers or that two packages offer, for a module that cannot be imported, and
    for a class that does not derive from `base`.
    """
    if name in ours:
        return ours[name]
    if ":" in name:
        return _load(name, name, base)
    offered = sorted({entry.value for entry in entry_points(group=group, name=name)})
    if len(offered) > 1:
        raise DiffalignError(
            f"{name}: several installed packages have this name; write {' or '.join(offered)} for the one that is meant"
        )
    if not offered:
        raise DiffalignError(_unknown(name, [*ours, *offered_names(group)], group))
    return _load(name, offered[0], base)


def offered_names(group: str) -> list[str]:
    """Return the names that other packages give to their classes in `group`. No module is imported."""
    return sorted({entry.name for entry in entry_points(group=group)})


def load_class(name: str) -> Any:
    """Return the class `module:Class`. Raises DiffalignError if there is none."""
    return _load(name, name, object)


def _load(name: str, value: str, base: type) -> type[Any]:
    """Import `value`, a `module:Class`; messages call it `name`."""
    if not CLASS.fullmatch(value):
        raise DiffalignError(f"{name}: write module:Class, such as my_package.losses:MyLoss, not {value!r}")
    entry = EntryPoint(name, value, "")
    try:
        importlib.import_module(entry.module)
    except Exception as error:  # a module of others may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{entry.module}.".startswith(f"{error.name}."):
            remedy = "install its package, or put its folder on PYTHONPATH"
            raise DiffalignError(f"{name}: there is no module {error.name}; {remedy}") from error
        said = (str(error).splitlines() or [""])[0]
        raise DiffalignError(f"{name}: {entry.module} cannot be imported: {type(error).__name__}: {said}") from error
    try:
        found = entry.load()
    except AttributeError as error:
        raise DiffalignError(f"{name}: {entry.module} has no class {entry.attr}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise DiffalignError(f"{name}: {value} is no subclass of {base.__module__}.{base.__name__}")
    return found


def _unknown(name: str, known: list[str], group: str) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
    return f"unknown {group.partition('.')[2].removesuffix('s')} {name!r}: {hint}"
