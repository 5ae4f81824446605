"""The latent cache: images and prompts are encoded once, so that training holds neither VAE nor text encoders.

    <cache>/<key>/latents.npy          [groups, K, C, h, w] float16, memory-mapped
    <cache>/<key>/<name>.npy           a prompt embedding, [distinct prompts + 1, ...] float16; the last is the empty prompt
    <cache>/<key>/index.json

The key hashes the encoded bytes of every image, the prompts, the model's weights and the resolution: a changed input has
another key and is never served stale.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.work import Task, finish
from diffalign.errors import DiffalignError

VERSION = "1"
Say = Callable[[str], None]


def to_square(image: Image.Image, side: int) -> np.ndarray:
    """Shorter side resized to `side`, centre cropped: uint8 [side, side, 3]."""
    scale = side / min(image.size)
    size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


def to_pixels(images: list[np.ndarray]) -> Tensor:
    """uint8 [H, W, 3] each -> float32 [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def cache_key(dataset: PreferenceDataset, groups: list[int], backbone: Any, resolution: int, members: int) -> str:
    """Hash of everything that decides the cache's content."""
    digest = hashlib.blake2b(digest_size=12)
    for part in (VERSION, backbone.fingerprint(), str(resolution), str(members)):
        digest.update(part.encode() + b"\0")
    ids, prompts = dataset.column("group_id"), dataset.column("prompt")
    for i in groups:
        digest.update(f"{ids[i]}\0{prompts[i]}\0".encode())
    wanted = {ids[i]: set(dataset.members(ids[i])) for i in groups}
    # Images are hashed one by one: the order of the shards is the order of the files, which is fixed.
    for rows in dataset.iter_images():
        for row in rows:
            if row.index in wanted.get(row.group_id, ()):
                digest.update(
                    f"{row.group_id}\0{row.index}\0".encode() + hashlib.blake2b(row.data, digest_size=12).digest()
                )
    return digest.hexdigest()


class LatentCache:
    """Memory-mapped latents and embeddings of chosen groups, in their order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = json.loads((folder / "index.json").read_text())
        self.prompt_of: list[int] = index["prompt_of"]
        self.latents = np.load(folder / "latents.npy", mmap_mode="r", allow_pickle=False)
        self.embeddings = {
            n: np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in index["embeddings"]
        }

    def conditioning(self, rows: list[int]) -> dict[str, Tensor]:
        """Prompt embeddings of groups, each [B, ...] float32."""
        which = [self.prompt_of[i] for i in rows]
        return {name: torch.from_numpy(values[which].astype(np.float32)) for name, values in self.embeddings.items()}

    @property
    def unconditional(self) -> dict[str, Tensor]:
        """Embeddings of the empty prompt, each [1, ...]."""
        return {name: torch.from_numpy(values[-1:].astype(np.float32)) for name, values in self.embeddings.items()}

    @classmethod
    def build(
        cls,
        dataset: PreferenceDataset,
        groups: list[int],
        members: int,
        backbone: Any,
        folder: Path,
        resolution: int,
        say: Say = print,
        batch_size: int = 8,
    ) -> "LatentCache":
        """Open the cache of these groups under `folder`, making it first if need be."""
        final = folder / cache_key(dataset, groups, backbone, resolution, members)

        def make() -> None:
            part = final.with_name(f"{final.name}.part")
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
            try:
                _write(dataset, groups, members, backbone, part, resolution, say, batch_size)
                part.rename(final)
            finally:
                shutil.rmtree(part, ignore_errors=True)

        # One process makes it, whoever comes first; the others wait for it.
        whole = Task(final.name, (final / "index.json").is_file, make)
        folder.mkdir(parents=True, exist_ok=True)
        finish([whole], folder / ".locks")
        return cls(final)


def cache_bytes(dataset: PreferenceDataset, groups: list[int], members: int, backbone: Any, resolution: int) -> int:
    """Size of the cache of these groups, from the model's shapes; one prompt is encoded to learn those of its embedding."""
    side = resolution // backbone.vae_scale_factor
    latents = len(groups) * members * backbone.latent_channels * side * side
    prompts = dataset.column("prompt")
    distinct = len({prompts[i] for i in groups}) + 1
    each = sum(values[0].numel() for values in backbone.encode_prompts([""]).values())
    return 2 * (latents + distinct * each)


def _half(values: Tensor, what: str) -> np.ndarray:
    """float16, refused where it would overflow."""
    array = values.float().cpu().numpy()
    if np.abs(array).max(initial=0.0) > np.finfo(np.float16).max:
        raise DiffalignError(f"{what} overflow float16 (largest {np.abs(array).max():.3g}); the model may need float32")
    return array.astype(np.float16)


def _write(
    dataset: PreferenceDataset,
    groups: list[int],
    members: int,
    backbone: Any,
    part: Path,
    resolution: int,
    say: Say,
    batch_size: int,
) -> None:
    part.mkdir(parents=True)
    ids, prompts = dataset.column("group_id"), dataset.column("prompt")
    distinct = list(dict.fromkeys(prompts[i] for i in groups))
    latent: np.memmap | None = None
    pending: list[tuple[int, int, np.ndarray]] = []

    def encode() -> None:
        nonlocal latent
        encoded = _half(backbone.encode_images(to_pixels([image for *_, image in pending])), "latents")
        if latent is None:
            shape = (len(groups), members, *encoded.shape[1:])
            _check_space(part, int(np.prod(shape)) * 2)
            latent = np.lib.format.open_memmap(part / "latents.npy", mode="w+", dtype=np.float16, shape=shape)
        for (row, member, _), values in zip(pending, encoded, strict=True):
            latent[row, member] = values
        pending.clear()

    for row, i in enumerate(groups):
        for member, image in enumerate(dataset.images(ids[i])[:members]):
            pending.append((row, member, to_square(image.decode(), resolution)))
            if len(pending) == batch_size:
                encode()
        if (row + 1) % 1000 == 0:
            say(f"encoded the images of {row + 1}/{len(groups)} groups")
    if pending:
        encode()
    if latent is not None:
        latent.flush()
    stores: dict[str, np.memmap] = {}
    texts = [*distinct, ""]
    for start in range(0, len(texts), batch_size):
        chunk = texts[start : start + batch_size]
        for name, values in backbone.encode_prompts(chunk).items():
            if name not in stores:
                shape = (len(texts), *values.shape[1:])
                _check_space(part, int(np.prod(shape)) * 2)
                stores[name] = np.lib.format.open_memmap(part / f"{name}.npy", mode="w+", dtype=np.float16, shape=shape)
            stores[name][start : start + len(chunk)] = _half(values, "prompt embeddings")
    for store in stores.values():
        store.flush()
    position = {prompt: n for n, prompt in enumerate(distinct)}
    index = {"prompt_of": [position[prompts[i]] for i in groups], "embeddings": sorted(stores)}
    (part / "index.json").write_text(json.dumps(index))
    say(f"cached latents of {len(groups)} groups and {len(distinct)} prompts")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiffalignError(
            f"the latent cache needs {needed / 2**30:.2f} GiB in {folder.parent}, {free / 2**30:.2f} GiB are free; "
            "free some space or point data.cache elsewhere"
        )
