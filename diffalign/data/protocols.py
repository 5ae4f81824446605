"""Define what this package needs of a model and of a config, so that it imports neither models nor config.

`diffalign.pipelines.Backbone` and the sections of `diffalign.config` have these members; so may any stand-in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from diffalign.pipelines.settings import SamplingSettings

CacheMode = Literal["all", "latents", "off"]
"""What is encoded before the first step: images and prompts, images only, or nothing."""


class PromptEncoder(Protocol):
    """The text encoders of a model."""

    @property
    def longest(self) -> int:
        """The number of tokens of a prompt that they read."""
        ...

    def count_cut(self, prompts: Sequence[str]) -> int:
        """Return how many distinct prompts are longer."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return everything that the trunk needs of B prompts, each [B, ...]."""
        ...

    def encode_unconditional(self) -> dict[str, Tensor]:
        """Return the same for no prompt, [1, ...] each: what sampling steers away from."""
        ...


class ImageEncoder(Protocol):
    """The VAE of a model. Pixels are float32 [B, 3, H, W] in [0, 1]; latents [B, C, h, w] are scaled for the trunk."""

    @property
    def latent_channels(self) -> int: ...
    @property
    def vae_scale_factor(self) -> int: ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Return the mean of each image's posterior."""
        ...

    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each image's posterior."""
        ...

    def vae_fingerprint(self) -> str:
        """Return a hash that is equal for two models with the same VAE."""
        ...


class Encoder(PromptEncoder, ImageEncoder, Protocol):
    """A model that encodes prompts and images."""

    @property
    def path(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def guidance(self) -> float | None: ...
    @property
    def condition(self) -> str | None: ...
    @property
    def default_resolution(self) -> int: ...
    @property
    def pixel_multiple(self) -> int: ...
    @property
    def max_side(self) -> int | None: ...

    def fingerprint(self) -> str:
        """Return a hash of everything that decides latents and embeddings."""
        ...


class ImageSampler(Protocol):
    """A model that draws images."""

    @property
    def path(self) -> str: ...
    @property
    def revision(self) -> str | None: ...

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings,
    ) -> Sequence[Image.Image]:
        """Return one image per prompt and seed."""
        ...

    def sample_with_latents(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
    ) -> Sequence[tuple[Image.Image, np.ndarray]]:
        """Return one image per prompt and seed, each with its latent [C, h, w]."""
        ...


class GroupSettings(Protocol):
    """Which groups of a dataset are used, at which size, and what is cached: a config's `data` section."""

    @property
    def split(self) -> str: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def group_size(self) -> int | None: ...
    @property
    def resolution(self) -> int | None: ...
    @property
    def buckets(self) -> str | list[list[int]]: ...
    @property
    def latent_sampling(self) -> str: ...
    @property
    def cache(self) -> CacheMode: ...
    @property
    def cache_dir(self) -> Path | None: ...
    @property
    def cache_dtype(self) -> str | None: ...


class CombineSettings(Protocol):
    """How several rewards become one label: a config's `labels.combine`."""

    @property
    def how(self) -> str: ...
    @property
    def weights(self) -> Mapping[str, float]: ...
    @property
    def gates(self) -> Mapping[str, float]: ...


class LabelSettings(Protocol):
    """Where labels come from: a config's `labels` section."""

    @property
    def source(self) -> str: ...
    @property
    def transform(self) -> str: ...
    @property
    def spread(self) -> str: ...
    @property
    def stats(self) -> Mapping[str, float] | None: ...
    @property
    def combine(self) -> CombineSettings | None: ...
