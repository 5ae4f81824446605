"""Latents of groups: encoded once into memory-mapped files, or at every step by a VAE that stays in memory.

    latents-<key>/<width>x<height>.npy          [groups of this size, K, C, h, w] float16: the posterior's mean
    latents-<key>/<width>x<height>-spread.npy   the same shape: its standard deviation (latent_sampling: posterior)
    latents-<key>/index.json

Where `diffalign synth` stored a model's own latents with the images, these are used: encoding the image again would add
an error as large as the differences that training looks at. That requires the same VAE, an image of the wanted size,
and a latent for every image of the group; a group half drawn and half encoded would reveal which is which.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from diffalign import stopping
from diffalign.data.buckets import Size, fit, header_size, to_pixels
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.protocols import ImageEncoder
from diffalign.errors import DiffalignError
from diffalign.files import check_space
from diffalign.progress import Say

BATCH = 8
"""Images of one group encoded at once, so a group's latents are bit-identical whatever other groups are encoded."""

STORED = ["latent", "latent_shape", "provenance"]


@dataclass(frozen=True)
class Frames:
    """The groups to encode, at most `members` images and one size each, and whether the posterior's spread is wanted."""

    dataset: PreferenceDataset
    groups: list[int]
    members: int
    sizes: list[Size]
    spread: bool = False

    def rows_of(self) -> dict[Size, list[int]]:
        """Return size -> rows, both in their order."""
        return {size: [row for row, s in enumerate(self.sizes) if s == size] for size in sorted(set(self.sizes))}


class Encoder:
    """Turns a group's images into float16 latents, for cached and uncached latents alike."""

    def __init__(self, frames: Frames, backbone: ImageEncoder) -> None:
        self.frames, self.backbone = frames, backbone
        self.ids = frames.dataset.column("group_id")
        self.vae = backbone.vae_fingerprint() if has_latents(frames.dataset) else ""
        self.taken = self.encoded = 0

    def group(self, row: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return means [k, C, h, w] of the group's k images and, if wanted, their spread; float16."""
        stored = self._stored(row)
        if stored is not None:
            self.taken += len(stored)
            return stored, np.zeros_like(stored) if self.frames.spread else None
        images = self.frames.dataset.images(self.ids[self.frames.groups[row]])[: self.frames.members]
        pictures = [fit(image.decode(), self.frames.sizes[row]) for image in images]
        self.encoded += len(pictures)
        means, spreads = [], []
        for start in range(0, len(pictures), BATCH):
            pixels = to_pixels(pictures[start : start + BATCH])
            if self.frames.spread:
                mean, spread = self.backbone.encode_posterior(pixels)
                spreads.append(_half(spread))
            else:
                mean = self.backbone.encode_images(pixels)
            means.append(_half(mean))
        return np.concatenate(means), np.concatenate(spreads) if spreads else None

    def said(self) -> str:
        """Return where the latents came from, as the end of a message; "" if none were stored with the images."""
        if not self.vae:
            return ""
        rest = f", {self.encoded} were encoded (another VAE or size, or not all of a group)" if self.encoded else ""
        return f"; {self.taken} are those stored with the images{rest}"

    def _stored(self, row: int) -> np.ndarray | None:
        """Return the latents [k, C, h, w] stored with the group's images; None if one lacks them, or VAE or size
        differ.
        """
        if not self.vae:
            return None
        dataset, group = self.frames.dataset, self.frames.groups[row]
        found: list[np.ndarray] = []
        for index in dataset.members(self.ids[group])[: self.frames.members]:
            place = int(dataset.image_index.find(np.array([group]), np.array([index]))[0])
            latent = stored_latent(dataset, place, self.vae, self.frames.sizes[row])
            if latent is None:
                return None
            found.append(latent)
        return np.stack(found)


def has_latents(dataset: PreferenceDataset) -> bool:
    """Return whether any file of images holds latents."""
    return any("latent" in pq.read_schema(path).names for path in dataset.shards)


def stored_latent(dataset: PreferenceDataset, place: int, vae: str, size: Size) -> np.ndarray | None:
    """Return the latent [C, h, w] float16 stored with an image; None if there is none, or VAE or size differ."""
    if "latent" not in dataset.image_index.names(place):
        return None
    table, row = dataset.image_index.read(place, [*STORED, "image"])
    stored = {name: table[name][row].as_py() for name in STORED}
    if stored["latent"] is None or json.loads(stored["provenance"] or "{}").get("vae") != vae:
        return None
    if header_size(table["image"][row].as_py()["bytes"], "", place) != size:
        return None
    return np.frombuffer(stored["latent"], np.float16).reshape(stored["latent_shape"])


class LiveLatents:
    """Latents encoded when they are asked for (`data.cache: off`); they take no disk, and the VAE stays in memory."""

    def __init__(self, frames: Frames, backbone: ImageEncoder) -> None:
        self.frames, self._encoder = frames, Encoder(frames, backbone)

    def batch(self, rows: list[int]) -> tuple[Tensor, Tensor | None]:
        """Return mean and spread of B groups of one size, each [B, K, C, h, w] float32; zeros for missing images."""
        found = [self._encoder.group(row) for row in rows]
        mean = np.zeros((len(rows), self.frames.members, *found[0][0].shape[1:]), np.float16)
        spread = np.zeros_like(mean)
        for n, (means, spreads) in enumerate(found):
            mean[n, : len(means)] = means
            if spreads is not None:
                spread[n, : len(spreads)] = spreads
        return _wide(mean), _wide(spread) if self.frames.spread else None


class LatentStore:
    """The cached latents of groups, memory-mapped; `batch` as in `LiveLatents`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = json.loads((folder / "index.json").read_text())
        self.sizes: list[Size] = [(width, height) for width, height in index["sizes"]]
        names = {size: _name(size) for size in sorted(set(self.sizes))}
        self.mean = {size: _open(folder / f"{name}.npy") for size, name in names.items()}
        self.spread = (
            {size: _open(folder / f"{name}-spread.npy") for size, name in names.items()} if index["spread"] else {}
        )
        counts: dict[Size, int] = {}
        self._at: list[int] = []
        for size in self.sizes:
            self._at.append(counts.get(size, 0))
            counts[size] = self._at[-1] + 1

    def batch(self, rows: list[int]) -> tuple[Tensor, Tensor | None]:
        """Return mean and spread of B groups of one size, each [B, K, C, h, w] float32."""
        size, at = self.sizes[rows[0]], [self._at[row] for row in rows]
        if any(self.sizes[row] != size for row in rows):
            raise ValueError(f"groups of different sizes in one batch: {[self.sizes[row] for row in rows]}")
        return _wide(self.mean[size][at]), _wide(self.spread[size][at]) if self.spread else None

    @classmethod
    def write(cls, folder: Path, frames: Frames, backbone: ImageEncoder, say: Say) -> None:
        """Encode all groups into `folder`."""
        encoder = Encoder(frames, backbone)
        done = 0
        for size, rows in frames.rows_of().items():
            files: list[np.memmap] = []
            for n, row in enumerate(rows):
                values = [v for v in encoder.group(row) if v is not None]
                if not files:  # the latents' shape is known from the first group of this size
                    shape = (len(rows), frames.members, *values[0].shape[1:])
                    check_space(folder, 2 * len(values) * int(np.prod(shape)), "the latent cache")
                    names = [_name(size), f"{_name(size)}-spread"][: len(values)]
                    files = [_create(folder / f"{name}.npy", shape) for name in names]
                for file, value in zip(files, values, strict=True):
                    file[n, : len(value)] = value
                stopping.check()
                done += 1
                if done % 1000 == 0:
                    say(f"encoded the images of {done}/{len(frames.groups)} groups")
            for file in files:
                file.flush()
        (folder / "index.json").write_text(json.dumps({"sizes": frames.sizes, "spread": frames.spread}))
        say(f"cached latents of {len(frames.groups)} groups{encoder.said()}")


def latent_bytes(frames: Frames, backbone: ImageEncoder) -> int:
    """Return the size of the cached latents in bytes, from the model's shapes."""
    side = backbone.vae_scale_factor
    pixels = sum((width // side) * (height // side) for width, height in frames.sizes)
    return 2 * (2 if frames.spread else 1) * pixels * frames.members * int(backbone.latent_channels)


def _name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _open(path: Path) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _create(path: Path, shape: tuple[int, ...]) -> np.memmap:
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)


def _wide(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _half(values: Tensor) -> np.ndarray:
    """Return float16 values. Raises DiffalignError where they would overflow."""
    array = values.float().cpu().numpy()
    if np.abs(array).max(initial=0.0) > np.finfo(np.float16).max:
        raise DiffalignError(f"latents overflow float16 (largest {np.abs(array).max():.3g}); the VAE may be broken")
    return array.astype(np.float16)
