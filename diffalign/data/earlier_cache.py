"""Read latents cached by versions before 0.2: one array of all groups of a size, without checksums.

latents-<key>/<width>x<height>.npy          [groups of this size, K, C, h, w] float16
latents-<key>/<width>x<height>-spread.npy   the same shape
prompts-<key>/<name>.bf16                   the values of all prompts, one after another, without a header
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffalign.data.records import Record
from diffalign.files import reading

MEND = "delete its folder, and the same command makes it again"


class EarlierLatents:
    """Latents by row, `mean` and `spread` [K, C, h, w] each."""

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        names = {"mean": "", **({"spread": "-spread"} if index["spread"] else {})}
        sizes = [f"{width}x{height}" for width, height in index["sizes"]]
        self._arrays = {
            size: {n: _array(folder / f"{size}{end}.npy") for n, end in names.items()} for size in set(sizes)
        }
        counts: dict[str, int] = {}
        self._places: list[tuple[str, int]] = []
        for size in sizes:
            self._places.append((size, counts.get(size, 0)))
            counts[size] = self._places[-1][1] + 1
        for size, arrays in self._arrays.items():
            for name, array in arrays.items():
                with reading(folder / f"{size}{names[name]}.npy", mend=MEND):
                    if len(array) != counts[size]:
                        raise ValueError(f"{len(array)} groups, not {counts[size]}")

    def read(self, number: int) -> Record:
        """Return the tensors of a row by name."""
        size, place = self._places[number]
        return {name: torch.from_numpy(array[place].copy()) for name, array in self._arrays[size].items()}


def _array(path: Path) -> np.ndarray:
    with reading(path, mend=MEND):
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
