"""Read and write small files (text, JSON, JSON lines) and check free disk space."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from diffalign.errors import DiffalignError, brief
from diffalign.files.parse import parse_json

DAMAGE = (
    ValueError, KeyError, TypeError, IndexError, AttributeError, AssertionError, EOFError, OverflowError, RecursionError,
    MemoryError, NotImplementedError, SafetensorError, yaml.YAMLError,
)  # fmt: skip
"""What parsers (json, yaml, numpy, pyarrow, safetensors) and code that takes their result apart raise for damaged bytes.

NotImplementedError is what pyarrow raises where a damaged byte names an encoding that it lacks.
"""


def make_folder(path: Path) -> Path:
    """Make a folder and those above it, if they are not there, and return it.

    Raises DiffalignError where there can be none: below a file, in /proc, or under a name that is too long.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise DiffalignError(f"{path}: no folder can be made there ({error.strerror}); choose another place") from error
    return path


def check_place(path: Path) -> None:
    """Raise DiffalignError where no file `path` can be written; call it before work whose result would be lost."""
    if not path.name or path.is_dir():
        raise DiffalignError(f"{path}: a folder; name a file")
    part = path.with_name(path.name + ".part")
    make_folder(path.parent)
    try:
        part.touch()
    except FileNotFoundError as error:
        raise DiffalignError(
            f"{path}: no file can be written there ({error.strerror}); choose another place"
        ) from error
    part.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path `<name>.part` to write to; when the block ends, rename it to `path`.

    A reader, or a run after a kill, sees either the old file or the complete new one. If the block fails, the old file
    stays and the part is deleted. Only one process may write a path at a time.
    """
    make_folder(path.parent)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write to; when the block ends, its files are those of `folder`, which other files stay in.

    A new folder appears under its name only when it is complete. In one that exists, each file is replaced in one step.
    """
    part = folder / ".part" if folder.exists() else folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    make_folder(part)
    try:
        yield part
        if not folder.exists():
            part.rename(folder)
            return
        for path in sorted(path for path in part.rglob("*") if path.is_file()):
            target = folder / path.relative_to(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 text file; it appears under its name only when it is complete."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def reading(path: Path, what: str = "", mend: str = "") -> Iterator[None]:
    """Turn errors of reading a file into a DiffalignError of one line: `what`, the path and the reason.

    mend: what to do where a file of our own is damaged. With it, everything that a parser raises is turned into such a
    line: no other code may stand in the block. Without it, the block reads text, and only errors of that are.
    """
    try:
        yield
    except DiffalignError:
        raise
    except OSError as error:
        # pyarrow raises OSError without a number for bytes that it cannot parse.
        if mend and (error.errno is None or isinstance(error, FileNotFoundError)):
            raise DiffalignError(f"{what}{path} cannot be read ({_reason(error)}); {mend}") from error
        raise DiffalignError(f"{what}{path}: {error.strerror or error}") from error
    except Exception as error:
        if mend and isinstance(error, DAMAGE):
            raise DiffalignError(f"{what}{path} cannot be read ({_reason(error)}); {mend}") from error
        if not isinstance(error, UnicodeDecodeError):
            raise
        raise DiffalignError(f"{what}{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error


def _reason(error: Exception) -> str:
    """Return the first line of an error as a reason."""
    text = getattr(error, "strerror", None) or brief(error)
    return f"no {text}" if isinstance(error, KeyError) else text


def read_json_lines(
    path: Path, last_step: int | None = None, needs: tuple[str, ...] = ("step",)
) -> list[dict[str, Any]]:
    """Return the rows of a .jsonl file, without those whose `step` is above `last_step`; [] if there is no file.

    needs: keys of each row; `step` is a number. A last line that a kill left unfinished is skipped. Raises
    DiffalignError for another line that cannot be read.
    """
    if not path.is_file():
        return []
    with reading(path, mend="delete it, or restore it from a copy"):
        # Not splitlines(): it also breaks at U+2028, which JSON allows inside a string.
        *lines, unfinished = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate([*lines, unfinished], start=1):
        try:
            row = parse_json(line)
            step: float = row["step"] + 0 if "step" in needs else 0
            for key in needs:
                row[key]
        except DAMAGE as error:
            if line.strip() and number <= len(lines):
                raise DiffalignError(f"{path}:{number} cannot be read ({_reason(error)}); delete this line") from error
            continue
        if last_step is None or step <= last_step:
            rows.append(row)
    return rows


def read_json(path: Path, mend: str = "delete it and make it again", *keys: str) -> Any:
    """Return the content of a .json file of ours; None if there is no file.

    keys: of an object that must be there. Raises DiffalignError, with `mend`, if it is no valid JSON or lacks a key.
    """
    if not path.is_file():
        return None
    with reading(path, mend=mend):
        found = parse_json(path.read_text(encoding="utf-8"))
        for key in keys:
            found[key]
    return found


def dotted_keys(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one flat mapping with keys such as `train.steps`; an empty mapping leaves no key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= dotted_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of `folder`, which need not exist yet."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.is_dir())
    return shutil.disk_usage(existing).free


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise DiffalignError if `needed` bytes do not fit on the disk of `folder`, which need not exist yet."""
    free = free_bytes(folder)
    if needed > free:
        raise DiffalignError(
            f"{what} {folder}: {needed / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free; free some space, point "
            "data.cache_dir elsewhere, or set data.cache=off"
        )
