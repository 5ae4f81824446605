"""Read the tar files of our own webdataset export."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

from diffalign.data.containers import DAMAGED
from diffalign.data.tables import Row, json_object


def export_rows(path: Path) -> Iterator[tuple[str, Row | str]]:
    """Yield the groups of an export: <group>.json, then <group>.<name> of each of its `images`, which become bytes.

    The tar may be compressed. A group of which something is missing comes as what is wrong with it.
    """
    where = ""
    row: Row | str = {}
    missing: list[str] = []
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                data = tar.extractfile(member) if member.isfile() else None
                if data is None:
                    continue
                if member.name.endswith(".json"):
                    if missing:
                        yield where, f"{missing[0]} is not in the file"
                    where, stem = f"{path}:{member.name}", member.name.removesuffix(".json")
                    row, missing = json_object(data.read().decode("utf-8", "replace")), []
                    if isinstance(row, str):
                        yield where, row
                    elif isinstance(row.get("images"), list):
                        missing = [f"{stem}.{name}" for name in row["images"]]
                        row["images"] = [f"{stem}.{name}" for name in row["images"]]
                elif member.name in missing and isinstance(row, dict):
                    missing.remove(member.name)
                    row["images"] = [data.read() if name == member.name else name for name in row["images"]]
                    if not missing:
                        yield where, row
    except DAMAGED as error:
        yield str(path), f"not a complete tar file ({error})"
        return
    if missing:
        yield where, f"{missing[0]} is not in the file"


def is_export(path: Path) -> bool:
    """Return whether a tar file begins as an export of ours does: with JSON that lists the group's images."""
    try:
        with tarfile.open(path, "r:*") as tar:
            first = next((member for member in tar if member.isfile()), None)
            data = tar.extractfile(first) if first is not None and first.name.endswith(".json") else None
            row = json_object(data.read().decode("utf-8", "replace")) if data is not None else ""
    except DAMAGED:
        return False
    return isinstance(row, dict) and isinstance(row.get("images"), list)
