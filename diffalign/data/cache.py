"""The cache: images and prompts are encoded once, so that training holds neither VAE nor text encoders.

Two folders, each under its own key, so that a new resolution encodes no prompt anew and a new prompt no image:
`latents.py` and `embeddings.py` say what is in them. A key hashes all that decides the content: the encoded bytes of every
image, prompts, the model's weights, sizes. A changed input has another key and is never served stale. Of several processes
one makes a folder, whoever comes first, and the others wait for it.

`data.cache` says what is encoded beforehand: `all`, `latents` (text encoders stay) or `off` (the VAE stays too). Training sees
the same numbers in each, to the last bit where the device computes alike.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from diffalign.data.buckets import bucket_sizes, group_sizes
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.embeddings import LivePrompts, PromptStore, prompt_bytes
from diffalign.data.latents import Frames, LatentStore, LiveLatents, latent_bytes
from diffalign.data.space import check_space
from diffalign.data.work import Task, finish

VERSION = "2"
Mode = Literal["all", "latents", "off"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class CachePlan:
    """What a training run reads of its images and prompts, and where it is kept."""

    frames: Frames
    prompts: list[str]
    folder: Path
    mode: Mode = "all"

    def latents(self, backbone: Any, say: Say = print) -> LatentStore | LiveLatents:
        """The latents, encoded first if they are wanted in the cache and not there."""
        if self.mode == "off":
            return LiveLatents(self.frames, backbone)
        final = self.latent_folder(backbone)
        _make(final, lambda part: LatentStore.write(part, self.frames, backbone, say))
        return LatentStore(final)

    def embeddings(self, backbone: Any, say: Say = print) -> PromptStore | LivePrompts:
        """The prompt embeddings, likewise."""
        if self.mode != "all":
            return LivePrompts(backbone)
        final = self.prompt_folder(backbone)
        _make(final, lambda part: PromptStore.write(part, self.prompts, backbone, say))
        return PromptStore(final)

    def latent_folder(self, backbone: Any) -> Path:
        return self.folder / f"latents-{latent_key(self.frames, backbone)}"

    def prompt_folder(self, backbone: Any) -> Path:
        parts = (VERSION, backbone.fingerprint(), *dict.fromkeys(self.prompts))
        return self.folder / f"prompts-{_hash(*parts).hexdigest()}"

    def missing(self, backbone: Any) -> dict[Path, int]:
        """Folders that are still to be made, and how many bytes they will take."""
        sizes: dict[Path, int] = {}
        if self.mode != "off":
            sizes[self.latent_folder(backbone)] = latent_bytes(self.frames, backbone)
        if self.mode == "all":
            sizes[self.prompt_folder(backbone)] = prompt_bytes(self.prompts, backbone)
        return {folder: size for folder, size in sizes.items() if not (folder / "index.json").is_file()}


def plan_cache(data: Any, dataset: PreferenceDataset, groups: list[int], members: int, backbone: Any) -> CachePlan:
    """The plan that a config's `data` section describes, for chosen groups of at most `members` images."""
    resolution = data.resolution or backbone.default_resolution
    sizes = group_sizes(dataset, groups, bucket_sizes(data.buckets, resolution, backbone.pixel_multiple))
    frames = Frames(dataset, groups, members, sizes, spread=data.latent_sampling == "posterior")
    prompts = dataset.column("prompt")
    folder = Path(data.cache_dir) if data.cache_dir else dataset.folder / "cache"
    return CachePlan(frames, [prompts[i] for i in groups], folder, data.cache)


def latent_key(frames: Frames, backbone: Any) -> str:
    """Hash of everything that decides the latents."""
    dataset = frames.dataset
    digest = _hash(VERSION, backbone.fingerprint(), str(frames.members), str(frames.spread))
    ids = dataset.column("group_id")
    for i, size in zip(frames.groups, frames.sizes, strict=True):
        digest.update(f"{ids[i]}\0{size}\0".encode())
    wanted = {ids[i]: set(dataset.members(ids[i])) for i in frames.groups}
    # Images are hashed one by one: the order of the shards is the order of the files, which is fixed.
    for path in dataset.shards:
        file = pq.ParquetFile(path)
        stored = [name for name in ("latent", "provenance") if "latent" in file.schema_arrow.names]
        for table in file.iter_batches(batch_size=64, columns=["group_id", "index", "image", *stored]):
            for n in range(table.num_rows):
                group, index = table["group_id"][n].as_py(), table["index"][n].as_py()
                if index not in wanted.get(group, ()):
                    continue
                digest.update(f"{group}\0{index}\0".encode() + _bytes_hash(table["image"][n].as_py()["bytes"]))
                for name in stored:
                    value = table[name][n].as_py() or b""
                    digest.update(_bytes_hash(value.encode() if isinstance(value, str) else value))
    return digest.hexdigest()


def refuse_if_full(folders: dict[Path, int]) -> None:
    """DiffalignError where the disk cannot hold what is still to be made."""
    if folders:
        check_space(next(iter(folders)).parent, sum(folders.values()), "data.cache_dir")


def _make(final: Path, write: Callable[[Path], None]) -> None:
    """A folder that appears under its name only when it is complete, made by one process."""

    def make() -> None:
        part = final.with_name(f"{final.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        part.mkdir(parents=True)
        try:
            write(part)
            part.rename(final)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    finish([Task(final.name, (final / "index.json").is_file, make)], final.parent / ".locks")


def _hash(*parts: str) -> hashlib.blake2b:
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest


def _bytes_hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=12).digest()
