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
from diffalign.data.schema import GROUPS_FILE
from diffalign.errors import DiffalignError
from diffalign.scoring.captions import (
    SOURCES,
    Caption,
    PromptTable,
    caption_of,
    folder_metadata,
    from_name,
    sidecar,
)
from diffalign.scoring.decode import SUFFIXES
from diffalign.scoring.items import FileOrigin, Item, ParquetImages, RowOrigin, printable

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
        caption = self.table.find(item.name, item.key) if self.table else None
        if caption is None:
            return item
        return replace(item, prompt=caption.prompt or item.prompt, metadata=item.metadata | caption.facts)


def collect(sources: list[str], prompting: Prompting | None = None) -> list[Item]:
    """Return the items of folders, files, globs, parquet files and datasets.

    Raises DiffalignError if a source holds no image, or an image is given twice.
    """
    prompting = prompting or Prompting()
    items: list[Item] = []
    for source in sources:
        found = [item for path in _expand(source) for item in _items(path, prompting)]
        if not found:
            raise DiffalignError(f"{source}: no image in it; known are {', '.join(SUFFIXES)}, and parquet files")
        items += found
    twice = [name for name, n in Counter(item.name for item in items).items() if n > 1]
    if twice:
        raise DiffalignError(f"{twice[0]!r} is given twice; name each image once")
    captioned = (prompting.apply(item) for item in items)
    return [replace(item, prompt=item.prompt and printable(item.prompt)) for item in captioned]


def _expand(source: str) -> list[Path]:
    """Return the path, or what a quoted glob matches. A path that exists is never taken for a pattern."""
    path = Path(source)
    if os.path.lexists(path) or not any(c in source for c in "*?["):
        if not os.path.lexists(path):
            raise DiffalignError(f"{printable(source)}: no such file or folder")
        return [path]
    root = Path(path.anchor) if path.is_absolute() else Path()
    return sorted(root.glob(str(path.relative_to(path.anchor) if path.is_absolute() else path)))


def _items(path: Path, prompting: Prompting) -> Iterator[Item]:
    if path.is_dir() and (path / GROUPS_FILE).is_file():
        yield from _dataset(path)
    elif path.is_dir():
        yield from _folder(path, prompting)
    elif path.suffix == ".parquet":
        yield from _parquet(path, prompting)
    else:
        listed, above = folder_metadata(path.parent, prompting.column)
        yield _file(path, path.name, listed, above, prompting)


def _folder(folder: Path, prompting: Prompting) -> Iterator[Item]:
    """Yield the images below a folder. Linked folders are not entered, so links cannot make a cycle."""
    above: dict[Path, Caption] = {}
    for place, folders, files in os.walk(folder, followlinks=False):
        folders.sort()
        here = Path(place)
        listed, one = folder_metadata(here, prompting.column)
        inherited = one or above.get(here.parent)
        if inherited is not None:
            above[here] = inherited
        pictures = {here / name for name in files if Path(name).suffix.lower() in SUFFIXES}
        # An image that metadata.jsonl names but that does not exist gets a row too.
        for path in sorted(pictures | set(listed)):
            yield _file(path, path.relative_to(folder).as_posix(), listed, inherited, prompting)


def _file(path: Path, key: str, listed: dict[Path, Caption], above: Caption | None, prompting: Prompting) -> Item:
    caption = listed.get(path) or above
    prompt = _prompt(path, caption, prompting.source)
    facts = caption.facts if caption else {}
    return Item(printable(path.as_posix()), printable(key), FileOrigin(path), prompt, facts)


def _prompt(path: Path, caption: Caption | None, source: str) -> str | None:
    if source in ("auto", "metadata") and caption is not None and caption.prompt:
        return caption.prompt
    if source in ("auto", "txt"):
        return sidecar(path)
    return from_name(path) if source == "name" else None


def _parquet(path: Path, prompting: Prompting) -> Iterator[Item]:
    """Yield the rows of a parquet file with an image column and possibly a prompt column."""
    try:
        names = pq.read_schema(path).names
    except (pa.ArrowInvalid, OSError) as error:
        raise DiffalignError(f"{path}: not a parquet file: {error}") from error
    column = next((c for c in IMAGE_COLUMNS if c in names), None)
    if column is None:
        raise DiffalignError(
            f"{path}: no image column; one of {', '.join(IMAGE_COLUMNS)} is needed, not {', '.join(names)}"
        )
    images = ParquetImages(path, column)
    others = pq.read_table(path, columns=[n for n in names if n != column]).to_pylist()
    number = 0
    for row_group, rows in enumerate(images.row_counts()):
        for row in range(rows):
            # A file with nothing but images has rows without any key.
            facts: dict[str, Any] = others[number] if number < len(others) else {}
            caption = caption_of(facts, f"{path} row {number}", prompting.column)
            name = f"{path.as_posix()}#{number}"
            yield Item(printable(name), f"#{number}", RowOrigin(images, row_group, row), caption.prompt, caption.facts)
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
