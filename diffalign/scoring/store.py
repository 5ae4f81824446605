"""Keep scores on disk: a journal that survives a kill, and an output file that is complete or does not exist.

    FILE            jsonl, csv or parquet by its suffix; one row an image; replaced in one step at the end of a run
    FILE.journal/   one file a process; a line for every score as soon as its batch is done

A score's key is a hash of the image's bytes, the prompt, the metadata and the identity of the reward, as far as the
reward reads them. A key in either place is not computed again, so the same command resumes and scores only what is new
or changed.
"""

import csv
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.data.own_parquet import open_parquet
from diffalign.data.tables import table_rows
from diffalign.errors import DiffalignError
from diffalign.files import make_folder, reading, replacing, write_whole
from diffalign.files.parse import parse_json
from diffalign.files.remote import is_address
from diffalign.scoring.mirror import Mirror

ENDINGS = (".jsonl", ".csv", ".parquet")
FIXED = ("image", "sha256", "prompt", "reason")
ROW_MEND = "delete this row, and the same command scores its image again, or choose another output"
IDENTITY, REASON = ".identity", ".reason"


@dataclass(frozen=True)
class Result:
    """A reward's columns for one image, NaN with the reason where it could not score."""

    values: dict[str, float]
    reason: str = ""


Known = dict[str, Result]
"""Results by key."""


def key_of(sha256: str, prompt: str | None, identity: dict[str, Any]) -> str:
    """Return the key of a score; `identity` includes the metadata's hash if the reward reads metadata."""
    read = prompt if "prompt" in identity["reads"] else None
    return hashlib.blake2b(json.dumps([sha256, read, identity], sort_keys=True).encode(), digest_size=16).hexdigest()


def with_facts(identity: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Return the identity of a score, with the metadata's hash if the reward reads metadata."""
    if "metadata" not in identity["reads"]:
        return identity
    packed = json.dumps(facts, sort_keys=True, default=str).encode()
    return {**identity, "facts": hashlib.blake2b(packed, digest_size=8).hexdigest()}


class Store:
    """Scores by key. Without a path nothing is read or written. mirror: sends what is written to an address.

    said_as: how the user named the path, for messages: `--output`, or the argument of Python.
    """

    def __init__(
        self, path: Path | None, process: int = 0, mirror: Mirror | None = None, said_as: str = "--output"
    ) -> None:
        self._said_as = said_as
        if path is not None and path.suffix not in ENDINGS:
            raise DiffalignError(f"{said_as} {path}: unknown suffix; one of {', '.join(ENDINGS)}")
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.known: dict[str, Result] = {}
        self.added: dict[str, Result] = {}
        self.journal = None if path is None else path.with_name(path.name + ".journal")
        self._process, self._mirror = process, mirror
        self._journaled: set[str] = set()
        self._stream: TextIO | None = None
        if path is not None:
            self._read_output(path)
            self._read_journal()

    def _read_output(self, path: Path) -> None:
        if not path.is_file():
            return
        if path.suffix == ".parquet":
            open_parquet(path, "delete it, and the same command scores again, or choose another output")
        for where, raw in table_rows(path):
            if isinstance(raw, str):
                raise DiffalignError(f"{self._said_as} {where}: {raw}; {ROW_MEND}")
            if not {"image", "sha256"} <= set(raw):
                raise DiffalignError(f"{where}: not a file of `diffalign score`; choose another output")
            with reading(Path(where), f"{self._said_as} ", ROW_MEND):
                row = _unpacked(raw)
                for name in [n for n in row if n.endswith(IDENTITY) and row[n]]:
                    label = name.removesuffix(IDENTITY)
                    key = key_of(str(row["sha256"]), row.get("prompt"), row[name])
                    self.known[key] = Result(_columns(row, label), row.get(label + REASON) or "")
            self.rows.append(row)

    def _read_journal(self) -> None:
        assert self.journal is not None
        for path in sorted(self.journal.glob("*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    row = parse_json(line)
                    values = {k: math.nan if v is None else float(v) for k, v in row["values"].items()}
                    self.known[row["key"]] = Result(values, row["reason"])
                    self._journaled.add(row["key"])
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue  # the line that was being written when the process died

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def add(self, results: dict[str, Result]) -> None:
        """Add a batch's results, and write them to the journal before the next batch starts."""
        self.known |= results
        self.added |= results
        if self.journal is None:
            return
        if self._stream is None:
            make_folder(self.journal)
            path = self.journal / f"{self._process}.jsonl"
            torn = path.is_file() and not path.read_bytes().endswith(b"\n")
            self._stream = path.open("a", encoding="utf-8")
            if torn:
                self._stream.write("\n")
        for key, result in results.items():
            values = {k: v if math.isfinite(v) else None for k, v in result.values.items()}
            self._stream.write(json.dumps({"key": key, "values": values, "reason": result.reason}) + "\n")
        self._stream.flush()
        if self._mirror is not None:
            self._mirror.sync()

    def finish(self, rows: list[dict[str, Any]], sources: list[str]) -> int:
        """Write the output; return how many earlier rows of other sources were kept.

        Columns of rewards that were not asked for this time stay with images that did not change, and so do rows of
        images outside `sources`: no score that was computed is lost.
        """
        if self.path is None or self.journal is None:
            return 0
        before = {str(row["image"]): row for row in self.rows}
        merged = [_carried(before.get(row["image"]), row) for row in rows]
        given = {row["image"] for row in rows}
        kept = [row for row in self.rows if row["image"] not in given and not _below(str(row["image"]), sources)]
        write_rows(self.path, merged + kept)
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        # A run on other images may have been killed before this one: its scores stay until they are asked for again.
        if self._journaled <= {key for row in merged + kept for key in _keys(row)}:
            shutil.rmtree(self.journal, ignore_errors=True)
        if self._mirror is not None:
            self._mirror.finish()
        return len(kept)


def _keys(row: dict[str, Any]) -> set[str]:
    return {key_of(str(row["sha256"]), row.get("prompt"), v) for n, v in row.items() if n.endswith(IDENTITY) and v}


def _below(name: str, sources: list[str]) -> bool:
    """Return whether an image belongs to one of the sources: files, folders, containers, and globs of these."""
    for source in sources:
        if name == source or name.startswith((source.rstrip("/") + "/", source + "#")):
            return True
        # As when images are listed, a path that exists is no pattern. Of an image that is gone, only the name is left.
        if (
            any(c in source for c in "*?[")
            and (is_address(source) or not os.path.lexists(source))
            and _matches(name, source)
        ):
            return True
    return False


def _matches(name: str, pattern: str) -> bool:
    """Return whether a glob matches a path, a folder above it, or the container that `#` ends."""
    file = name.partition("#")[0]
    places = {part for path in (PurePath(name), PurePath(file)) for part in (path, *path.parents)}
    return any(_parts_match(place.parts, PurePath(pattern).parts) for place in places)


def _parts_match(parts: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_parts_match(parts[n:], patterns[1:]) for n in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and _parts_match(parts[1:], patterns[1:])


def _carried(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    same = old is not None and all(old.get(k) == new.get(k) for k in ("sha256", "prompt"))
    return {**new, **{k: v for k, v in (old or {}).items() if same and k not in new}}


def _columns(row: dict[str, Any], label: str) -> dict[str, float]:
    """Return {column: value} of a label; the first column's name is "", since the identity does not hold it."""
    found = {"": row.get(label)}
    found |= {
        name.removeprefix(label + "."): row[name]
        for name in row
        if name.startswith(label + ".") and not name.endswith((IDENTITY, REASON))
    }
    return {k: math.nan if v is None or v == "" else float(v) for k, v in found.items()}


def _unpacked(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as it was before a csv or parquet file flattened it."""
    return {
        name: parse_json(value) if name.endswith(IDENTITY) and isinstance(value, str) and value else
        None if value == "" and name != "reason" else value
        for name, value in row.items()
    }  # fmt: skip


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows to jsonl, csv or parquet, complete or not at all. NaN is null, or empty in csv."""
    plain = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
    names = list(dict.fromkeys(name for row in plain for name in row))
    if path.suffix == ".jsonl":
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in plain))
        return
    flat = [{n: _packed(row.get(n)) for n in names} for row in plain]
    with replacing(path) as part:
        if path.suffix == ".csv":
            with part.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, names)
                writer.writeheader()
                writer.writerows(flat)
        else:
            pq.write_table(pa.Table.from_pylist(flat, schema=_schema(names)), part, write_page_checksum=True)


def _packed(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else value


def _schema(names: list[str]) -> pa.Schema:
    """Return strings, and doubles for scores, so that a column of nothing but nulls keeps its type."""
    text = {n for n in names if n in FIXED or n.endswith((IDENTITY, REASON))}
    return pa.schema([(n, pa.string() if n in text else pa.float64()) for n in names])
