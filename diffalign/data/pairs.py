"""Bring your own pairs: a csv, or two folders, to a dataset folder. Files are copied in byte for byte."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.data.prompts import PromptRow
from diffalign.data.schema import GROUPS_FILE, inside
from diffalign.data.writer import ImageWriter, write_groups
from diffalign.errors import DiffalignError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Pair:
    """A prompt with the better and the worse image's files; `where` names the row for messages."""

    prompt: str
    winner: Path
    loser: Path
    where: str


def pairs_from_csv(path: Path) -> Iterator[Pair]:
    """Columns `prompt`, `winner`, `loser`; files relative to the csv and below its folder."""
    try:
        stream = path.open(newline="", encoding="utf-8")
    except OSError as error:
        raise DiffalignError(f"{path}: {error.strerror}") from error
    with stream:
        reader = csv.DictReader(stream)
        missing = {"prompt", "winner", "loser"} - set(reader.fieldnames or [])
        if missing:
            raise DiffalignError(
                f"{path}:1: column {', '.join(sorted(missing))} is missing; prompt, winner and loser are needed"
            )
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if any(not (row[c] or "").strip() for c in ("prompt", "winner", "loser")):
                raise DiffalignError(f"{where}: prompt, winner or loser is empty")
            winner, loser = (inside(path.parent, row[c].strip()) for c in ("winner", "loser"))
            yield Pair(row["prompt"].strip(), winner, loser, where)


def pairs_from_folders(winners: Path, losers: Path) -> Iterator[Pair]:
    """Pictures of equal stem in both folders, with the caption in `<stem>.txt` beside the winner."""
    for folder in (winners, losers):
        if not folder.is_dir():
            raise DiffalignError(f"{folder}: no such folder")
    others = {p.stem: p for p in losers.iterdir() if p.suffix.lower() in PICTURES}
    for winner in sorted(p for p in winners.iterdir() if p.suffix.lower() in PICTURES):
        caption = winner.with_suffix(".txt")
        if winner.stem not in others:
            raise DiffalignError(f"{winner}: no picture of the same name in {losers}")
        if not caption.is_file() or not caption.read_text(encoding="utf-8").strip():
            raise DiffalignError(f"{winner}: no caption; write it into {caption.name} beside it")
        yield Pair(caption.read_text(encoding="utf-8").strip(), winner, others[winner.stem], str(winner))


def import_pairs(pairs: Iterator[Pair], out: Path, split: str = "train") -> int:
    """Write a dataset of groups of two, the winner first; returns how many. A picture that cannot be read is named."""
    if (out / GROUPS_FILE).exists():
        raise DiffalignError(f"{out} holds a dataset already; choose another folder")
    groups: list[dict[str, Any]] = []
    with ImageWriter(out) as writer:
        for number, pair in enumerate(pairs):
            row = PromptRow(pair.prompt)
            group = f"{number:06d}-{row.prompt_id}"
            for index, path in enumerate((pair.winner, pair.loser)):
                writer.write(group, index, _checked(path, pair.where), "imported", 0, {"file": path.name})
            groups.append(
                {
                    "group_id": group,
                    "prompt_id": row.prompt_id,
                    "prompt": pair.prompt,
                    "preference": [1.0, 0.0],
                    "split": split,
                    "metadata": {},
                }
            )
        if not groups:
            raise DiffalignError("there is no pair to import")
    return write_groups(out, groups)


def _checked(path: Path, where: str) -> bytes:
    try:
        data = path.read_bytes()
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DiffalignError(f"{where}: {path.name} is no whole picture ({reason})") from error
    return data
