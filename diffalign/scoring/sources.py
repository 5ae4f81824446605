"""List the images that `diffalign score` was given, in a fixed order."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.prompts_beside import prompt_beside, prompt_within
from diffalign.data.schema import GROUPS_FILE
from diffalign.data.tables import UNREADABLE_CELLS
from diffalign.errors import DiffalignError
from diffalign.files.images import SUFFIXES
from diffalign.files.parse import valid_unicode
from diffalign.files.paths import leads_out, own_file
from diffalign.scoring.captions import (
    SOURCES,
    Caption,
    PromptTable,
    caption_of,
    folder_metadata,
    from_name,
)
from diffalign.scoring.containers import ArrowImages, CellOrigin, archive_members
from diffalign.scoring.items import FileOrigin, Item, ParquetImages, RefusedOrigin, RowOrigin

BESIDE = (".txt", ".caption", ".json", ".jsonl", ".csv", ".parquet", ".md", ".html")
"""Suffixes of files that are expected beside images; they are not reported as skipped."""
CONTAINERS = (".parquet", ".arrow", ".tar", ".zip")
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "bytes")


@dataclass(frozen=True)
class Prompting:
    """How prompts are found. one: the same for all. table: from `--prompts`. source: one of captions.SOURCES."""

    one: str | None = None
    table: PromptTable | None = None
    source: str = "auto"
    column: str | None = None

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise DiffalignError(f"--prompt-from {self.source}: unknown; one of {', '.join(SOURCES)}")

    def apply(self, item: Item) -> Item:
        """Return the item with the prompt given by the user, which takes precedence over what stands beside the image."""
        if self.one is not None:
            return replace(item, prompt=self.one)
        caption = self.table.find(item.name, item.key, item.path) if self.table else None
        if caption is None:
            return item
        return replace(item, prompt=caption.prompt or item.prompt, metadata=item.metadata | caption.facts)


def collect(sources: list[str], prompting: Prompting | None = None, skipped: Counter[str] | None = None) -> list[Item]:
    """Return the items of folders, files, globs, parquet files and datasets.

    skipped: counts, by suffix, the files of folders that are no images of a known kind. Raises DiffalignError if a
    source holds no image, or an image is given twice.
    """
    prompting = prompting or Prompting()
    skipped = Counter() if skipped is None else skipped
    items: list[Item] = []
    for source in sources:
        found = [item for path in _expand(source) for item in _items(path, prompting, skipped)]
        if not found:
            raise DiffalignError(f"{source}: no image in it; known are {', '.join(SUFFIXES + CONTAINERS)}")
        items += found
    twice = [name for name, n in Counter(item.name for item in items).items() if n > 1]
    if twice:
        raise DiffalignError(f"{twice[0]!r} is given twice; name each image once")
    captioned = (prompting.apply(item) for item in items)
    return [replace(item, prompt=item.prompt and valid_unicode(item.prompt)) for item in captioned]


def _expand(source: str) -> list[Path]:
    """Return the path, or what a quoted glob matches. A path that exists is never taken for a pattern."""
    path = Path(source)
    if os.path.lexists(path) or not any(c in source for c in "*?["):
        if not os.path.lexists(path):
            raise DiffalignError(f"{valid_unicode(source)}: no such file or folder")
        return [path]
    root = Path(path.anchor) if path.is_absolute() else Path()
    return sorted(root.glob(str(path.relative_to(path.anchor) if path.is_absolute() else path)))


def _items(path: Path, prompting: Prompting, skipped: Counter[str]) -> Iterator[Item]:
    if path.is_dir() and (path / GROUPS_FILE).is_file():
        yield from _dataset(path)
    elif path.is_dir():
        yield from _folder(path, prompting, skipped)
    elif path.suffix.lower() in CONTAINERS:
        yield from _contained(path, "", prompting)
    else:
        listed, above = folder_metadata(path.parent, prompting.column)
        yield _file(path, path.name, listed.get(path) or above, prompting)


def _folder(folder: Path, prompting: Prompting, skipped: Counter[str]) -> Iterator[Item]:
    """Yield the images below a folder. Linked folders are not entered, so links cannot make a cycle.

    A metadata file may name images in folders below; the one nearest to an image counts.
    """
    above: dict[Path, Caption] = {}
    listed: dict[Path, Caption] = {}
    found: list[tuple[Path, Caption | None]] = []
    for place, folders, files in os.walk(folder, followlinks=False):
        folders.sort()
        here = Path(place)
        named, one = folder_metadata(here, prompting.column)
        listed |= named
        inherited = one or above.get(here.parent)
        if inherited is not None:
            above[here] = inherited
        found += [(here / name, inherited) for name in sorted(files) if Path(name).suffix.lower() in SUFFIXES]
        suffixes = (Path(name).suffix.lower() or "without a suffix" for name in files)
        skipped.update(s for s in suffixes if s not in SUFFIXES and s not in BESIDE)
        skipped.update("linked folders" for name in folders if (here / name).is_symlink())
    if not found and not listed:
        # Shards are read where nothing else is there: img2dataset, for one, writes a parquet file beside its images.
        shards = sorted(
            p for p in folder.rglob("*") if p.suffix.lower() in CONTAINERS and not p.name.startswith("cache-")
        )
        for shard in shards:
            skipped[shard.suffix.lower()] -= shard.suffix.lower() not in BESIDE
            if leads_out(folder, shard):
                skipped["links that lead out of the folder"] += 1
                continue
            yield from _contained(shard, shard.relative_to(folder).as_posix(), prompting)
        for suffix in [s for s, n in skipped.items() if n <= 0]:
            del skipped[suffix]
    # An image that a metadata file names but that was not met, because it does not exist, gets a row too.
    for path, inherited in sorted([*found, *((p, None) for p in set(listed) - {p for p, _ in found})], key=_order):
        key = path.relative_to(folder).as_posix()
        try:
            yield _file(own_file(folder, path), key, listed.get(path) or inherited, prompting, folder)
        except DiffalignError as error:
            yield Item(valid_unicode(path.as_posix()), valid_unicode(key), RefusedOrigin(str(error)))


def _order(found: tuple[Path, Caption | None]) -> tuple[tuple[str, ...], str]:
    """Sort images by folder, a folder's own images before those of folders below."""
    return found[0].parent.parts, found[0].name


def _file(path: Path, key: str, caption: Caption | None, prompting: Prompting, root: Path | None = None) -> Item:
    prompt, fault = _prompt(path, caption, prompting.source, root)
    facts = caption.facts if caption else {}
    return Item(valid_unicode(path.as_posix()), valid_unicode(key), FileOrigin(path), prompt, facts, fault=fault)


def _prompt(path: Path, caption: Caption | None, source: str, root: Path | None) -> tuple[str | None, str]:
    """Return the prompt, and why a file that should hold it cannot be read. root: as `prompt_beside` takes it."""
    if source in ("auto", "metadata") and caption is not None and caption.prompt:
        return caption.prompt, ""
    if source == "name":
        return from_name(path), ""
    prompt, fault = prompt_beside(path, root) if source in ("auto", "txt") else (None, "")
    if prompt is None and source in ("auto", "image"):
        prompt = prompt_within(path)
    return prompt, fault


def _contained(path: Path, below: str, prompting: Prompting) -> Iterator[Item]:
    """Yield the images of a parquet, arrow, tar or zip file. below: its path in the folder that is scored."""
    if path.suffix.lower() == ".parquet":
        yield from _parquet(path, below, prompting)
    elif path.suffix.lower() == ".arrow":
        yield from _arrow(path, below, prompting)
    else:
        for member in archive_members(path):
            name = f"{path.as_posix()}#{member.origin.name}"
            prompt = None if prompting.source in ("name", "none", "metadata") else member.prompt
            prompt = from_name(Path(member.origin.name)) if prompting.source == "name" else prompt
            key = valid_unicode(f"{below}#{member.origin.name}" if below else member.origin.name)
            yield Item(valid_unicode(name), key, member.origin, prompt, member.facts, fault=member.fault)


def _arrow(path: Path, below: str, prompting: Prompting) -> Iterator[Item]:
    """Yield the rows of an arrow file, as `datasets` saves them to disk."""
    images = ArrowImages(path)
    if not images.names:
        return
    column = _image_column(images.names, path)
    for number, (batch, row, facts) in enumerate(images.rows(column)):
        caption = caption_of(facts, f"{path} row {number}", prompting.column)
        name, key = f"{path.as_posix()}#{number}", f"{below}#{number}"
        yield Item(valid_unicode(name), key, CellOrigin(images, batch, row, column), caption.prompt, caption.facts)


def _image_column(names: list[str], path: Path) -> str:
    column = next((c for c in IMAGE_COLUMNS if c in names), None)
    if column is None:
        raise DiffalignError(
            f"{path}: no image column; one of {', '.join(IMAGE_COLUMNS)} is needed, not {', '.join(names)}"
        )
    return column


def _parquet(path: Path, below: str, prompting: Prompting) -> Iterator[Item]:
    """Yield the rows of a parquet file with an image column and possibly a prompt column."""
    try:
        names = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise DiffalignError(f"{path}: not a parquet file: {error}") from error
    column = _image_column(names, path)
    images = ParquetImages(path, column)
    try:
        others = pq.read_table(path, columns=[n for n in names if n != column]).to_pylist()
    except UNREADABLE_CELLS as error:
        raise DiffalignError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    number = 0
    for row_group, rows in enumerate(images.row_counts()):
        for row in range(rows):
            # A file with nothing but images has rows without any key.
            facts: dict[str, Any] = others[number] if number < len(others) else {}
            caption = caption_of(facts, f"{path} row {number}", prompting.column)
            name = f"{path.as_posix()}#{number}"
            yield Item(
                valid_unicode(name),
                f"{below}#{number}",
                RowOrigin(images, row_group, row),
                caption.prompt,
                caption.facts,
            )
            number += 1


def _dataset(folder: Path) -> Iterator[Item]:
    """Yield the images of a dataset folder, with their group's prompt and metadata."""
    dataset = PreferenceDataset(folder)
    place = {group: i for i, group in enumerate(dataset.column("group_id"))}
    for shard in dataset.shards:
        images = ParquetImages(shard, "image")
        keys = pq.read_table(shard, columns=["group_id", "index"]).to_pylist()
        number = 0
        for row_group, rows in enumerate(images.row_counts()):
            for row in range(rows):
                group, index = keys[number]["group_id"], keys[number]["index"]
                number += 1
                if group not in place:
                    raise DiffalignError(f"{shard} row {number - 1}: group {group!r} is not in {GROUPS_FILE}")
                facts = dataset.group(place[group])
                key = f"{group}/{index}"
                origin = RowOrigin(images, row_group, row)
                yield Item(
                    f"{folder.as_posix()}/{key}", key, origin, facts["prompt"], facts["metadata"], (group, index)
                )
