"""Cache what images and prompts are encoded to, so that training needs neither the VAE nor the text encoders.

There are two folders, one for latents and one for prompt embeddings, each named by a hash of everything that decides
its content: the encoded bytes of every image, the prompts, the model's weights, sizes. So a new resolution does not
encode prompts again, a new prompt does not encode images again, and a changed input never reads an outdated cache.
`latents.py` and `embeddings.py` describe the content. Processes that need a folder make it together, file by file, and
what a killed command has made is kept.

`data.cache` says what is encoded before the first step: `all`, `latents` (the text encoders stay loaded) or `off` (the
VAE stays too). Training sees the same numbers in all three, bit-identical where the device computes alike.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from diffalign.data.buckets import bucket_sizes, group_sizes
from diffalign.data.cut_prompts import cut_lines
from diffalign.data.dataset import PreferenceDataset, bytes_of
from diffalign.data.embeddings import LivePrompts, PromptStore, prompt_bytes
from diffalign.data.latents import Frames, LatentStore, LiveLatents, latent_bytes
from diffalign.data.own_parquet import IMAGES_MEND, open_parquet, read_batches
from diffalign.data.protocols import CacheMode, Encoder, GroupSettings, PromptEncoder
from diffalign.data.records import made_bytes, read_index
from diffalign.data.schema import CONDITIONS
from diffalign.errors import DiffalignError
from diffalign.files import check_space
from diffalign.progress import Say

VERSION = "2"
PROMPT_VERSION = "3"


@dataclass(frozen=True)
class CachePlan:
    """The images and prompts of a training run, the model that encodes them, and where the result is kept."""

    frames: Frames
    prompts: list[str]
    backbone: Encoder
    folder: Path
    mode: CacheMode = "all"

    def latents(self, say: Say = print) -> LatentStore | LiveLatents:
        """Return the latents; encode them first if the cache should hold them and does not."""
        if self.mode == "off":
            return LiveLatents(self.frames, self.backbone)
        if read_index(self.latent_folder) is None:
            LatentStore.make(self.latent_folder, self.frames, self.backbone, say)
        return LatentStore(self.latent_folder)

    def embeddings(self, say: Say = print) -> PromptStore | LivePrompts:
        """Return the prompt embeddings; encode them first if the cache should hold them and does not."""
        return prompt_embeddings(self.prompts, self.backbone, self.prompt_folder, self.mode, self.frames.exact, say)

    @cached_property
    def latent_folder(self) -> Path:
        """The folder of the latents. Computed once, since its name hashes every image."""
        return self.folder / f"latents-{latent_key(self.frames, self.backbone)}"

    @cached_property
    def prompt_folder(self) -> Path:
        """The folder of the prompt embeddings."""
        return self.folder / prompt_key(self.prompts, self.backbone, self.frames.exact)

    def missing(self) -> dict[Path, int]:
        """Return the folders that are not complete, with the bytes that they will still take."""
        found: dict[Path, int] = {}
        if self.mode != "off" and read_index(self.latent_folder) is None:
            found[self.latent_folder] = latent_bytes(self.frames, self.backbone)
        if self.mode == "all" and read_index(self.prompt_folder) is None:
            found[self.prompt_folder] = prompt_bytes(self.prompts, self.backbone, self.frames.exact)
        return {folder: max(0, size - made_bytes(folder)) for folder, size in found.items()}

    def check_space(self) -> None:
        """Raise DiffalignError if the missing folders do not fit on the disk."""
        check_space(self.folder, sum(self.missing().values()), "data.cache_dir")


def check_conditions(dataset: PreferenceDataset, groups: list[int]) -> None:
    """Raise DiffalignError where some of the groups have a condition image and others none."""
    ids = dataset.column("group_id")
    places = dataset.condition_places([ids[i] for i in groups])
    missing = [ids[i] for i, place in zip(groups, places, strict=True) if place < 0]
    if 0 < len(missing) < len(groups):
        raise DiffalignError(
            f"{dataset.folder}: {len(missing)} of {len(groups)} groups have no condition image, such as {missing[0]}, and "
            f"others have one; convert pairs with and without one into two datasets, or delete {dataset.folder / CONDITIONS}"
        )


def plan_cache(
    data: GroupSettings, dataset: PreferenceDataset, groups: list[int], members: int, backbone: Encoder
) -> CachePlan:
    """Return the plan for a config's `data` section and the given groups, of at most `members` images each."""
    resolution = data.resolution or backbone.default_resolution
    allowed = bucket_sizes(data.buckets, resolution, backbone.pixel_multiple, backbone.max_side)
    sizes = group_sizes(dataset, groups, allowed)
    check_conditions(dataset, groups)
    conditions = len(dataset.condition_index) > 0
    if conditions and backbone.condition is None:
        raise DiffalignError(
            f"{dataset.folder} has condition images, and {backbone.path} (family {backbone.family}) takes none; train a model "
            f"that edits images, or delete {dataset.folder / CONDITIONS} to train on the prompts alone"
        )
    frames = Frames(
        dataset,
        groups,
        members,
        sizes,
        spread=data.latent_sampling == "posterior",
        exact=data.cache_dtype == "float32",
        conditions=conditions,
    )
    prompts = dataset.column("prompt")
    folder = Path(data.cache_dir) if data.cache_dir else dataset.folder / "cache"
    return CachePlan(frames, [prompts[i] for i in groups], backbone, folder, data.cache)


def prompt_embeddings(
    prompts: list[str], backbone: PromptEncoder, folder: Path, mode: CacheMode, exact: bool, say: Say = print
) -> PromptStore | LivePrompts:
    """Return the embeddings of prompts, kept in `folder`; encode them first if the cache should hold them and does not."""
    for line in cut_lines({"the model": backbone}, prompts):
        say(line)
    if mode != "all":
        return LivePrompts(backbone, exact)
    if read_index(folder) is None:
        PromptStore.make(folder, prompts, backbone, say, exact)
    return PromptStore(folder)


def prompt_key(prompts: list[str], backbone: Encoder, exact: bool) -> str:
    """Return the name of the folder that keeps the embeddings of these prompts."""
    parts = (PROMPT_VERSION, backbone.fingerprint(), *exact_key(exact), *dict.fromkeys(prompts))
    return f"prompts-{_hash(*parts).hexdigest()}"


def exact_key(exact: bool) -> tuple[str, ...]:
    """Return what tells a cache in float32 from others; others have the keys of versions that knew no float32."""
    return ("data.cache_dtype=float32",) if exact else ()


def latent_key(frames: Frames, backbone: Encoder) -> str:
    """Return the hash of everything that decides the latents."""
    dataset = frames.dataset
    digest = _hash(VERSION, backbone.fingerprint(), str(frames.members), str(frames.spread), *exact_key(frames.exact))
    ids = dataset.column("group_id")
    for i, size in zip(frames.groups, frames.sizes, strict=True):
        digest.update(f"{ids[i]}\0{size}\0".encode())
    wanted = {ids[i]: set(dataset.members(ids[i])) for i in frames.groups}
    # The order of the images is that of the files and so is fixed. Stored latents count too, since they may be used.
    for path in dataset.shards:
        file = open_parquet(path, IMAGES_MEND)
        stored = [name for name in ("latent", "provenance") if "latent" in file.schema_arrow.names]
        for table in read_batches(path, 64, ["group_id", "index", "image", *stored], IMAGES_MEND):
            for n in range(table.num_rows):
                group, index = table["group_id"][n].as_py(), table["index"][n].as_py()
                if index not in wanted.get(group, ()):
                    continue
                digest.update(f"{group}\0{index}\0".encode() + _bytes_hash(bytes_of(table["image"][n].as_py())))
                for name in stored:
                    value = table[name][n].as_py() or b""
                    digest.update(_bytes_hash(value.encode() if isinstance(value, str) else value))
    for i in frames.groups if frames.conditions else ():
        image = dataset.condition(ids[i])
        digest.update(b"condition\0" + _bytes_hash(image.data if image else b""))
    return digest.hexdigest()


def _hash(*parts: str) -> hashlib.blake2b:
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest


def _bytes_hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=12).digest()
