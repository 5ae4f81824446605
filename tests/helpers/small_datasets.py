"""Data sets of a few small groups, and an encoder whose latents can be worked out by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.prompts import PromptRow
from diffalign.data.schema import score_schema
from diffalign.data.writer import ImageWriter, parquet_writer, write_groups

SIZES = {"a": 3, "b": 3, "c": 2}

LABELS = SimpleNamespace(source="preference", transform="none", stats=None, spread="dataset")


def picture(value: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def write_images(out: Path, changed: tuple[int, int] | None = None, **sizes: tuple[int, int]) -> None:
    with ImageWriter(out) as writer:
        for n, (group, count) in enumerate(SIZES.items()):
            for k in range(count):
                value = 500 if (n, k) == changed else 10 * n + k
                writer.write(group, k, picture(value, sizes.get(f"{group}{k}", (16, 16))), "model", 100 + k, {})


def group_rows(**members: list[int]) -> list[dict[str, Any]]:
    return [
        {
            "group_id": g, "prompt_id": PromptRow(f"prompt {g}").prompt_id, "prompt": f"prompt {g}", "split": "train",
            "preference": list(np.linspace(0, 1, n)), "metadata": {}, "members": members.get(g),
        }
        for g, n in SIZES.items()
    ]  # fmt: skip


class Encoder:
    """Means of 8 x 8 blocks as latents, the length of the prompt as its embedding."""

    default_resolution, pixel_multiple, vae_scale_factor, latent_channels, max_side = 16, 8, 8, 3, None

    def __init__(self, weights: str = "w") -> None:
        self.weights, self.encoded, self.texts = weights, 0, 0

    def fingerprint(self) -> str:
        return self.weights

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.encoded += len(pixels)
        return torch.nn.functional.avg_pool2d(pixels, 8)

    def encode_posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.encode_images(pixels)
        return mean, mean / 4

    longest = 77

    def count_cut(self, prompts: list[str]) -> int:
        return 0

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        self.texts += len(prompts)
        return {"length": torch.tensor([[float(len(p))] for p in prompts])}

    def encode_unconditional(self) -> dict[str, torch.Tensor]:
        return self.encode_prompts([""])


def settings(**changes: Any) -> SimpleNamespace:
    known = {"split": "train", "group_size": None, "limit": None, "cache": "all", "cache_dir": None, "resolution": None}
    return SimpleNamespace(**{
        **known, "buckets": "none", "latent_sampling": "mean", "cache_dtype": None, **changes
    })  # fmt: skip


def quiet(_: str) -> None:
    pass


def scored(
    folder: Path, scores: dict[str, list[list[float]]], generators: list[str] | None = None, same: bool = False
) -> PreferenceDataset:
    """A dataset of groups with these scores: reward -> one list a group."""
    groups = next(iter(scores.values()))
    with ImageWriter(folder) as writer:
        for g, values in enumerate(groups):
            for k in range(len(values)):
                name = generators[k] if generators else "m"
                writer.write(f"g{g}", k, picture(0 if same else 10 * g + k), name, k, {})
    rows = [
        {"group_id": f"g{g}", "prompt_id": PromptRow(f"p{g}").prompt_id, "prompt": f"p{g}", "preference": [],
         "split": "train", "metadata": {}}
        for g in range(len(groups))
    ]  # fmt: skip
    write_groups(folder, rows)
    for reward, lists in scores.items():
        table = [
            {"group_id": f"g{g}", "index": k, "score": v, "reason": ""}
            for g, values in enumerate(lists)
            for k, v in enumerate(values)
        ]
        schema = score_schema(("score",), {"version": "1", "weights": "none", "licence": "MIT", "settings": {}})
        with parquet_writer(folder / "scores" / f"{reward}.parquet", schema) as writer_:
            writer_.write_table(pa.Table.from_pylist(table, schema=schema))
    return PreferenceDataset(folder)
