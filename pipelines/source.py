"""Where a model came from, and a hash that tells whether it has changed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from diffalign.files.fingerprint import DIGITS, add_samples


@dataclass(frozen=True)
class Source:
    """Where a model came from. `path` is what the user gave, `folder` where its files lie."""

    path: str
    folder: Path
    revision: str | None
    variant: str | None = None
    absent: dict[str, None] = field(default_factory=dict)
    file: Path | None = None
    """All weights, for a checkpoint in one file; `folder` then holds its configs."""

    def fingerprint(self, *more: str) -> str:
        """Hash configs and weights: 16 hex digits.

        Weights enter by name, size and samples of their bytes: a model trained again in the same folder gets another hash,
        and a large one takes no minutes to read.
        """
        return self._hash(self.folder, self.path, str(self.revision), str(self.variant), *more)

    def content_fingerprint(self) -> str:
        """Hash configs and weights alone, wherever the folder lies: a moved or copied model has the same hash."""
        return self._hash(self.folder, str(self.variant))

    def component_fingerprint(self, component: str) -> str:
        """Hash one component alone, wherever it lies: two models that share a VAE share this."""
        return self._hash(self.folder / component, str(self.variant))

    def _hash(self, folder: Path, *more: str) -> str:
        digest = hashlib.sha256("\0".join(more).encode())
        for file in sorted(folder.rglob("*")):
            name = file.relative_to(folder)
            if not file.is_file() or any(part.startswith(".") for part in name.parts) or name.parts[0] in self.absent:
                continue
            if file.suffix in (".json", ".txt", ".model"):
                digest.update(f"\0{name}\0".encode() + file.read_bytes())
            elif file.suffix == ".safetensors":
                add_samples(digest, str(name), file)
        if self.file is not None:
            add_samples(digest, self.file.name, self.file)
        return digest.hexdigest()[:DIGITS]
