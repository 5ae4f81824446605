"""Describe one image to score: where its bytes are, and what is known of its prompt."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.data.containers import FileOrigin, Origin
from diffalign.files.images import Unreadable, area


@dataclass(frozen=True)
class Item:
    """An image to score.

    name: unique among the items, as the user would write it. key: the name below its source, for pairing two folders.
    group: (group id, index) if it comes from a dataset folder. fault: why a file that should hold the prompt is unreadable.
    """

    name: str
    key: str
    origin: Origin
    prompt: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    group: tuple[str, int] | None = None
    fault: str = ""

    @property
    def path(self) -> Path | None:
        """The image's file; None if it lies in a container."""
        return self.origin.path if isinstance(self.origin, FileOrigin) else None


def digest(data: bytes) -> str:
    """Return SHA-256 in hex, as `sha256sum` prints it."""
    return hashlib.sha256(data).hexdigest()


def scan(item: Item) -> tuple[str, int, str]:
    """Return the hash of an image's bytes, its number of pixels, and why it cannot be read, else "".

    An unreadable image has a stand-in for the hash.
    """
    try:
        data = item.origin.read()
        return digest(data), area(data), ""
    except Unreadable as error:
        return f"unread {item.name}", 0, str(error)
