"""List the images that `diffalign score` was given, in a fixed order."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from diffalign.data.containers import (
    CONTAINERS,
    TABLES,
    AddressOrigin,
    Archive,
    FileOrigin,
    ParquetImages,
    RefusedOrigin,
    RowOrigin,
    containers_below,
    image_rows,
    kind_of,
)
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.folder_metadata import Caption, caption_of, folder_metadata
from diffalign.data.own_parquet import IMAGES_MEND, read_columns
from diffalign.data.prompts_beside import prompt_beside, prompt_within
from diffalign.data.schema import GROUPS_FILE
from diffalign.data.tables import table_schema
from diffalign.errors import DiffalignError
from diffalign.files.images import SUFFIXES
from diffalign.files.parse import valid_unicode
from diffalign.files.paths import inside, leads_out, own_file
from diffalign.files.remote import RemoteFolder, is_address, local_copy
from diffalign.scoring.captions import (
    SOURCES,
    PromptTable,
    from_name,
)
from diffalign.scoring.containers import Member, archive_members
from diffalign.scoring.items import Item
from diffalign.scoring.numbered_rows import GENEVAL_FILE, NumberedRows, is_numbered

BESIDE = (".txt", ".caption", ".json", ".jsonl", ".csv", ".parquet", ".md", ".html")
"""Suffixes of files that are expected beside images; they are not reported as skipped."""
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "bytes")


@dataclass(frozen=True)
class Prompting:
    """How prompts are found. one: the same for all. table: from `--prompts`. source: one of captions.SOURCES."""

    one: str | None = None
    table: PromptTable | NumberedRows | None = None
    source: str = "auto"
    column: str | None = None

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise DiffalignError(f"--prompt-from {self.source}: unknown; one of {', '.join(SOURCES)}")

    def apply(self, item: Item) -> Item:
        """Return the item with the prompt given by the user, which takes precedence over what stands beside the image."""
        if self.one is not None:
            return replace(item, prompt=self.one)
        caption = None
        if isinstance(self.table, PromptTable):
            caption = self.table.find(item.name, item.key, item.path)
        elif self.table is not None:
            caption = self.table.find(item.key, item.prompt)
        if caption is None:
            return item
        return replace(item, prompt=caption.prompt or item.prompt, metadata=item.metadata | caption.facts)


def collect(sources: list[str], prompting: Prompting | None = None, skipped: Counter[str] | None = None) -> list[Item]:
    """Return the items of folders, files, globs, parquet files, datasets and addresses.

    skipped: counts, by suffix, the files of folders that are no images of a known kind. Raises DiffalignError if a
    source holds no image, or an image is given twice.
    """
    prompting = prompting or Prompting()
    skipped = Counter() if skipped is None else skipped
    items: list[Item] = []
    for source in sources:
        if is_address(source):
            found = list(_at_address(RemoteFolder(source), prompting, skipped))
        else:
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
    if not source:
        raise DiffalignError("an image source is empty; name a file or folder, or . for the current folder")
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
    elif kind_of(path) in CONTAINERS:
        yield from _contained(path, "", prompting, skipped)
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
    numbered: dict[Path, NumberedRows] = {}
    for place, folders, files in os.walk(folder, followlinks=False):
        folders.sort()
        here = Path(place)
        named, one = folder_metadata(here, prompting.column)
        listed |= named
        by_number = prompting.source in ("auto", "metadata") and GENEVAL_FILE in files
        if by_number and is_numbered(inside(here, GENEVAL_FILE)):
            numbered[here] = NumberedRows(here / GENEVAL_FILE, prompting.column)
        inherited = one or above.get(here.parent)
        if inherited is not None:
            above[here] = inherited
        found += [(here / name, inherited) for name in sorted(files) if Path(name).suffix.lower() in SUFFIXES]
        _count_skipped(files, skipped)
        skipped.update("linked folders" for name in folders if (here / name).is_symlink())
    if not found and not listed:
        # Shards are read where nothing else is there: img2dataset, for one, writes a parquet file beside its images.
        for shard in containers_below(folder):
            skipped[kind_of(shard)] -= kind_of(shard) not in BESIDE
            if leads_out(folder, shard):
                skipped["links that lead out of the folder"] += 1
                continue
            yield from _contained(shard, shard.relative_to(folder).as_posix(), prompting, skipped)
        for suffix in [s for s, n in skipped.items() if n <= 0]:
            del skipped[suffix]
    # An image that a metadata file names but that was not met, because it does not exist, gets a row too.
    for path, inherited in sorted([*found, *((p, None) for p in set(listed) - {p for p, _ in found})], key=_order):
        key = path.relative_to(folder).as_posix()
        try:
            item = _file(own_file(folder, path), key, listed.get(path) or inherited, prompting, folder)
        except DiffalignError as error:
            yield Item(valid_unicode(path.as_posix()), valid_unicode(key), RefusedOrigin(str(error)))
            continue
        rows = next((place for place in path.parents if place in numbered), None)
        if rows is not None and not item.metadata:
            caption = numbered[rows].find(path.relative_to(rows).as_posix(), item.prompt)
            item = replace(item, prompt=item.prompt or caption.prompt, metadata=caption.facts) if caption else item
        yield item


def _count_skipped(names: Iterable[str], skipped: Counter[str]) -> None:
    """Count, by suffix, the files that are neither images nor expected beside them."""
    kinds = (kind_of(PurePosixPath(name)) or "without a suffix" for name in names)
    skipped.update(kind for kind in kinds if kind not in SUFFIXES and kind not in BESIDE)


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


def _at_address(folder: RemoteFolder, prompting: Prompting, skipped: Counter[str]) -> Iterator[Item]:
    """Yield the images below an address. As in a folder, containers are read only where no image lies beside them.

    A container is copied into a temporary folder first.
    """
    if GROUPS_FILE in folder.sizes:
        raise DiffalignError(f"{folder.path}: a dataset folder; copy it to a disk, and score it there")
    _count_skipped(folder.sizes, skipped)
    members = list(archive_members(folder, prompting.column))
    for member in members:
        address = folder.address(member.origin.name)
        item = _member(member, folder.path, "", prompting)
        yield replace(item, name=valid_unicode(address), origin=AddressOrigin(address))
    for name in () if members else folder.sizes:
        if (kind := kind_of(PurePosixPath(name))) in CONTAINERS:
            skipped[kind] -= kind not in BESIDE
            yield from _contained(local_copy(folder.address(name)), name, prompting, skipped, folder.address(name))
    for suffix in [s for s, n in skipped.items() if n <= 0]:
        del skipped[suffix]


def _contained(
    path: Path, below: str, prompting: Prompting, skipped: Counter[str], name: str | None = None
) -> Iterator[Item]:
    """Yield the images of a parquet, arrow, tar or zip file.

    below: its path in the folder that is scored. name: what the user calls it, where `path` is a copy.
    """
    name = name or path.as_posix()
    if kind_of(path) in TABLES:
        yield from _table(path, name, below, prompting)
        return
    archive = Archive(path)
    _count_skipped(archive.sizes, skipped)
    for member in archive_members(archive, prompting.column):
        yield _member(member, name, below, prompting)


def _member(member: Member, name: str, below: str, prompting: Prompting) -> Item:
    """Return the item of an image in an archive or at an address, with the prompt that stands beside it."""
    inner = member.origin.name
    prompt, facts, source = None, dict(member.facts), prompting.source
    if source in ("auto", "metadata") and member.caption is not None:
        prompt, facts = member.caption.prompt, facts | member.caption.facts
    if source == "name":
        prompt = from_name(Path(inner))
    elif prompt is None and source not in ("none", "metadata"):
        prompt = member.beside
    key = valid_unicode(f"{below}#{inner}" if below else inner)
    return Item(valid_unicode(f"{name}#{inner}"), key, member.origin, prompt, facts, fault=member.fault)


def _table(path: Path, name: str, below: str, prompting: Prompting) -> Iterator[Item]:
    """Yield the rows of a parquet or arrow file with an image column and possibly a prompt column."""
    names = table_schema(path).names
    if not names:
        return
    column = next((c for c in IMAGE_COLUMNS if c in names), None)
    if column is None:
        raise DiffalignError(
            f"{name}: no image column; one of {', '.join(IMAGE_COLUMNS)} is needed, not {', '.join(names)}"
        )
    for number, (where, row, origin) in enumerate(image_rows(path, column)):
        caption = Caption(None) if isinstance(row, str) else caption_of(row, where, prompting.column)
        fault = row if isinstance(row, str) else ""
        key = f"{below}#{number}"
        yield Item(
            valid_unicode(f"{name}#{number}"), valid_unicode(key), origin, caption.prompt, caption.facts, fault=fault
        )


def _dataset(folder: Path) -> Iterator[Item]:
    """Yield the images of a dataset folder, with their group's prompt and metadata."""
    dataset = PreferenceDataset(folder)
    place = {group: i for i, group in enumerate(dataset.column("group_id"))}
    for shard in dataset.shards:
        images = ParquetImages(shard, "image")
        keys = read_columns(shard, ["group_id", "index"], IMAGES_MEND).to_pylist()
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
