"""Images in tar and zip files, and below addresses, with the prompts that stand beside them, as in a folder."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from diffalign.data.containers import Archive, MemberOrigin
from diffalign.data.folder_metadata import METADATA_FILES, Caption, folder_metadata
from diffalign.data.prompts_beside import TEXTS, prompt_in_text
from diffalign.errors import DiffalignError
from diffalign.files.facts import geneval_facts
from diffalign.files.images import SUFFIXES, Unreadable
from diffalign.files.parse import parse_json
from diffalign.files.remote import RemoteFolder

LARGEST_TEXT = 1_000_000


@dataclass(frozen=True)
class Member:
    """An image in an archive. caption: from a metadata file; beside: the prompt in a file beside it. fault: why a file that
    should hold the prompt is unreadable.
    """

    origin: MemberOrigin
    caption: Caption | None
    beside: str | None
    facts: dict[str, Any]
    fault: str


def archive_members(archive: Archive | RemoteFolder, column: str | None) -> Iterator[Member]:
    """Yield the images of a tar or zip file, or of an address, in the order of names; webdataset's layout is one.

    The prompt of `a.jpg` is in a metadata file of its folder or one above, in `a.txt`, `a.caption` or `a.json`. column: the
    prompt's in metadata files.
    """
    if isinstance(archive, RemoteFolder):
        archive.fetch([name for name, size in archive.sizes.items() if size <= LARGEST_TEXT and _is_text(name)])
    listed = _listed(archive, column)
    for name in sorted(archive.sizes):
        if PurePosixPath(name).suffix.lower() not in SUFFIXES or PurePosixPath(name).name.startswith("._"):
            continue
        beside, facts, fault = _beside(archive, name)
        yield Member(MemberOrigin(archive, name), listed.get(name), beside, facts, fault)


def _is_text(name: str) -> bool:
    """Return whether a file may hold prompts."""
    place = PurePosixPath(name)
    return place.suffix in (*TEXTS, ".json") or place.name in METADATA_FILES


def _listed(archive: Archive | RemoteFolder, column: str | None) -> dict[str, Caption]:
    """Return the captions in the metadata files of an archive, by the member that each names."""
    found: dict[str, Caption] = {}
    for name in sorted(archive.sizes, key=lambda name: (name.count("/"), name)):  # the one nearest to an image counts
        place = PurePosixPath(name)
        if place.name not in METADATA_FILES:
            continue
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            try:
                (folder / place.name).write_bytes(archive.read(name))
                named, one = folder_metadata(folder, column)
            except DiffalignError as error:
                raise DiffalignError(str(error).replace(made, f"{archive.path}#{place.parent}")) from error
        found |= {(place.parent / path.relative_to(folder).as_posix()).as_posix(): c for path, c in named.items()}
        if one is not None:
            below = "" if place.parent == PurePosixPath() else f"{place.parent}/"
            found |= {member: one for member in archive.sizes if member.startswith(below)}
    return found


def _beside(archive: Archive | RemoteFolder, name: str) -> tuple[str | None, dict[str, Any], str]:
    prompt, facts, fault = None, {}, ""
    # webdataset's key ends at the first dot of the name; a plain folder's at the last.
    folder, _, base = name.rpartition("/")
    stems = dict.fromkeys(
        f"{folder}/{stem}" if folder else stem for stem in (base.rpartition(".")[0], base.partition(".")[0])
    )
    for suffix in (*TEXTS, ".json"):
        file = next((f"{stem}{suffix}" for stem in stems if f"{stem}{suffix}" in archive.sizes), None)
        if file is None or archive.sizes[file] > LARGEST_TEXT:
            continue
        try:
            data = archive.read(file)
            prompt = prompt or prompt_in_text(data, suffix)
            if suffix == ".json" and isinstance(row := parse_json(data), dict):
                facts = geneval_facts(row)
        except (Unreadable, ValueError) as error:
            fault = fault or f"{PurePosixPath(file).name}: {error}"
    return prompt, facts, fault
