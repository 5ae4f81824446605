"""Decide which names may become names of files, and which files lie inside a folder, links included."""

import hashlib
import os
import re
from pathlib import Path

from diffalign.errors import DiffalignError

PLAIN_NAME = re.compile(r"[\w+-](?:[\w .+-]{0,98}[\w+-])?")
"""A name that is one part of a path on every system: it begins and ends with a letter, a digit, _, + or -."""
NOT_PLAIN = "is no plain name; use letters, digits, `_`, `-` and dots"
FOLLOW_LINKS = "DIFFALIGN_FOLLOW_LINKS"
"""The environment variable that lets links lead out of the folder that is read, where it is 1."""
LONGEST_MEMBER = 120


def is_plain_name(name: object) -> bool:
    """Return whether a text may become a file's name, or a part of one, as it is."""
    return isinstance(name, str) and PLAIN_NAME.fullmatch(name) is not None


def plain_name(name: str, what: str) -> str:
    """Return the name if it may become a part of a file's name; `what` says what it names, such as `split`.

    Raises DiffalignError for one with `/`, `..`, control characters and the like, which could lead to another folder.
    """
    if not is_plain_name(name):
        raise DiffalignError(f"{what} {name!r} {NOT_PLAIN}")
    return name


def member_name(text: str) -> str:
    """Return a text as one part of a member's name in an archive: letters, digits, `_` and `-` stay, the rest is escaped.

    Different texts give different names. Dots are escaped too, since webdataset's key ends at the first one.
    """
    escaped = re.sub(r"[^A-Za-z0-9_-]", lambda found: "".join(f"%{b:02X}" for b in _utf8(found.group())), text)
    if not escaped or len(escaped) > LONGEST_MEMBER:
        digest = hashlib.blake2b(_utf8(text), digest_size=8).hexdigest()
        return f"{escaped[: LONGEST_MEMBER - 17]}%{digest}"
    return escaped


def inside(folder: Path, name: str) -> Path:
    """Return `folder / name`. Raises DiffalignError if the name, or a link on its way, leads out of the folder."""
    below = os.path.normpath(name) if name and "\0" not in name else os.pardir
    if below.startswith((os.sep, os.pardir)):
        below = os.path.relpath(folder / below, folder)
    if Path(below).parts[:1] == (os.pardir,):
        raise DiffalignError(f"path {name!r} leaves its folder {folder}; only files below it are read")
    path = folder / below
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that is too long, or that no file system can hold
        raise DiffalignError(f"path {name[:60]!r}: {getattr(error, 'strerror', None) or error}") from error
    if leads_out(folder, path):
        raise DiffalignError(
            f"{name!r} is a link that leads out of its folder {folder}; copy the file there, or set {FOLLOW_LINKS}=1 if "
            "the links are yours"
        )
    return path


def own_file(folder: Path, path: Path) -> Path:
    """Return a path below `folder` as it is. Raises DiffalignError for a link that leads out of the folder."""
    return inside(folder, str(path.relative_to(folder)))


def own_files(folder: Path, *patterns: str) -> list[Path]:
    """Return the files below a folder that match one of the glob patterns, sorted; errors as of `own_file`."""
    return [own_file(folder, path) for path in sorted(p for pattern in patterns for p in folder.glob(pattern))]


def leads_out(folder: Path, path: Path) -> bool:
    """Return whether a link between `folder` and the `path` below it leads to a place outside of the folder.

    The folder itself may be a link. A download of huggingface_hub links to the files of its own cache, which count as inside.
    """
    if os.environ.get(FOLLOW_LINKS) == "1" or not _has_link(folder, path):
        return False
    root, target = _real(folder), Path(os.path.realpath(path))
    return not any(target.is_relative_to(place) for place in (root, *_hub_store(root)))


def _has_link(folder: Path, path: Path) -> bool:
    place = folder
    for part in path.relative_to(folder).parts:
        place = place / part
        if place.is_symlink():
            return True
    return False


def _hub_store(root: Path) -> list[Path]:
    """Return the folder of the files that a snapshot in huggingface_hub's cache links to; none for any other folder."""
    parts = root.parts
    at = max((n for n, part in enumerate(parts) if part == "snapshots"), default=0)
    return [Path(*parts[:at], "blobs")] if at and len(parts) > at + 1 else []


def _real(folder: Path) -> Path:
    return Path(os.path.realpath(folder))


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")
