"""Latents of groups: encoded once into memory-mapped files, or at every step by a VAE that stays in memory.

    latents-<key>/00000.safetensors   records (records.py), one a group:
        mean     [k, C, h, w] float16 (or float32, data.cache_dtype), the posterior's mean of the group's k images
        spread   the same shape: its standard deviation (latent_sampling: posterior)
        condition   [C, h, w], the mean of the image that the group's images are edits of, if there is one
    latents-<key>/index.json          the size of each group's images, K

Where `diffalign synth` stored a model's own latents with the images, these are used: encoding the image again would add
an error as large as the differences that training looks at. That requires the same VAE, an image of the wanted size,
and a latent for every image of the group; a group half drawn and half encoded would reveal which is which.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.data.buckets import Size, fit, header_size, to_pixels
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.earlier_cache import EarlierLatents
from diffalign.data.own_parquet import IMAGES_MEND, open_parquet
from diffalign.data.protocols import ImageEncoder
from diffalign.data.records import INDEX, MEND, Reader, Record, Records, finished_index, make_records, share
from diffalign.errors import DiffalignError
from diffalign.files import reading
from diffalign.files.parse import parse_json
from diffalign.progress import ImageProgress, Say

BATCH = 8
"""Images of one group encoded at once, so a group's latents are bit-identical whatever other groups are encoded."""

STORED = ["latent", "latent_shape", "provenance"]


@dataclass(frozen=True)
class Frames:
    """The groups to encode, at most `members` images and one size each, and whether the posterior's spread is wanted.

    exact: latents stay float32. conditions: every group has a condition image, which is encoded, too.
    """

    dataset: PreferenceDataset
    groups: list[int]
    members: int
    sizes: list[Size]
    spread: bool = False
    exact: bool = False
    conditions: bool = False

    @property
    def dtype(self) -> type[np.floating[Any]]:
        """The number type of the latents."""
        return np.float32 if self.exact else np.float16

    def rows_of(self) -> dict[Size, list[int]]:
        """Return size -> rows, both in their order."""
        return {size: [row for row, s in enumerate(self.sizes) if s == size] for size in sorted(set(self.sizes))}


class Encoder:
    """Turns a group's images into latents of `frames.dtype`, for cached and uncached latents alike."""

    def __init__(self, frames: Frames, backbone: ImageEncoder) -> None:
        self.frames, self.backbone = frames, backbone
        self.ids = frames.dataset.column("group_id")
        self.vae = backbone.vae_fingerprint() if has_latents(frames.dataset) else ""
        self.taken = self.encoded = 0

    def group(self, row: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return means [k, C, h, w] of the group's k images and, if wanted, their spread."""
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
                spreads.append(self._rounded(spread))
            else:
                mean = self.backbone.encode_images(pixels)
            means.append(self._rounded(mean))
        return np.concatenate(means), np.concatenate(spreads) if spreads else None

    def condition(self, row: int) -> np.ndarray:
        """Return the mean [C, h, w] of the group's condition image, at the size of its images."""
        image = self.frames.dataset.condition(self.ids[self.frames.groups[row]])
        assert image is not None, "the plan has checked that every group has one"
        pixels = to_pixels([fit(image.decode(), self.frames.sizes[row])])
        return self._rounded(self.backbone.encode_images(pixels))[0]

    def _rounded(self, values: Tensor) -> np.ndarray:
        """Return the values in `frames.dtype`. Raises DiffalignError where they would overflow."""
        array = values.float().cpu().numpy()
        largest = np.abs(array).max(initial=0.0)
        if largest > np.finfo(self.frames.dtype).max:
            raise DiffalignError(f"latents overflow float16 (largest {largest:.3g}); the VAE may be broken")
        return array.astype(self.frames.dtype)

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
        return np.stack(found).astype(self.frames.dtype)


def has_latents(dataset: PreferenceDataset) -> bool:
    """Return whether any file of images holds latents."""
    return any("latent" in open_parquet(path, IMAGES_MEND).schema_arrow.names for path in dataset.shards)


def stored_latent(dataset: PreferenceDataset, place: int, vae: str, size: Size) -> np.ndarray | None:
    """Return the latent [C, h, w] float16 stored with an image; None if there is none, or VAE or size differ."""
    if "latent" not in dataset.image_index.names(place):
        return None
    table, row = dataset.image_index.read(place, [*STORED, "image"])
    stored = {name: table[name][row].as_py() for name in STORED}
    with reading(dataset.image_index.path(place), mend=IMAGES_MEND):
        if stored["latent"] is None or parse_json(stored["provenance"] or "{}").get("vae") != vae:
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
        mean = np.zeros((len(rows), self.frames.members, *found[0][0].shape[1:]), self.frames.dtype)
        spread = np.zeros_like(mean)
        for n, (means, spreads) in enumerate(found):
            mean[n, : len(means)] = means
            if spreads is not None:
                spread[n, : len(spreads)] = spreads
        return _wide(mean), _wide(spread) if self.frames.spread else None

    def conditions(self, rows: list[int]) -> Tensor:
        """Return the latents of B groups' condition images, [B, C, h, w] float32."""
        return _wide(np.stack([self._encoder.condition(row) for row in rows]))


class LatentStore:
    """The cached latents of groups, memory-mapped; `batch` as in `LiveLatents`."""

    def __init__(self, folder: Path) -> None:
        """Open a finished cache. Raises DiffalignError where it is not finished or damaged."""
        self.folder = folder
        index = finished_index(folder)
        with reading(folder / INDEX, mend=MEND):
            self.sizes: list[Size] = [(width, height) for width, height in index["sizes"]]
            self._members = index.get("members")
            self._reader: Reader = Records(folder, index) if "files" in index else EarlierLatents(folder, index)

    def batch(self, rows: list[int]) -> tuple[Tensor, Tensor | None]:
        """Return mean and spread of B groups of one size, each [B, K, C, h, w] float32; zeros for missing images."""
        if len({self.sizes[row] for row in rows}) > 1:
            raise ValueError(f"groups of different sizes in one batch: {[self.sizes[row] for row in rows]}")
        records = [self._reader.read(row) for row in rows]
        mean, spread = (self._padded([r[name] for r in records if name in r]) for name in ("mean", "spread"))
        assert mean is not None
        return mean, spread

    def conditions(self, rows: list[int]) -> Tensor:
        """Return the latents of B groups' condition images, [B, C, h, w] float32."""
        return torch.stack([self._reader.read(row)["condition"] for row in rows]).float()

    def _padded(self, values: list[Tensor]) -> Tensor | None:
        """Return [B, K, C, h, w] float32 of tensors [k, C, h, w]; None of none."""
        if not values:
            return None
        padded = torch.zeros(len(values), self._members or len(values[0]), *values[0].shape[1:])
        for n, value in enumerate(values):
            padded[n, : len(value)] = value.float()
        return padded

    @classmethod
    def make(cls, folder: Path, frames: Frames, backbone: ImageEncoder, say: Say) -> None:
        """Encode all groups into `folder`, together with other processes."""
        encoder = Encoder(frames, backbone)

        def record(row: int) -> Record:
            means, spreads = encoder.group(row)
            found = {"mean": means, **({} if spreads is None else {"spread": spreads})}
            if frames.conditions:
                found["condition"] = encoder.condition(row)
            return {name: torch.from_numpy(values) for name, values in found.items()}

        facts = {"sizes": frames.sizes, "members": frames.members}
        total = len(frames.groups)
        show = ImageProgress(say, every=60.0, unit="groups", closing=False).named("encoding images")
        if mine := make_records(folder, total, record, facts, show):
            say(f"cached latents of {share(mine, total)} groups{encoder.said()}")


def latent_bytes(frames: Frames, backbone: ImageEncoder) -> int:
    """Return the size of the cached latents in bytes, from the model's shapes."""
    side = backbone.vae_scale_factor
    pixels = sum((width // side) * (height // side) for width, height in frames.sizes)
    each = (2 if frames.spread else 1) * frames.members + int(frames.conditions)
    return np.dtype(frames.dtype).itemsize * each * pixels * int(backbone.latent_channels)


def _wide(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
