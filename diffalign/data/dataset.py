"""Reading a dataset folder without loading it: columns when asked for, images one by one or streamed."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from diffalign.data.schema import GROUPS_FILE
from diffalign.errors import DiffalignError


@dataclass(frozen=True)
class ImageRow:
    """One image as stored: `data` are the encoded bytes."""

    group_id: str
    index: int
    data: bytes
    generator: str
    seed: int

    def decode(self) -> Image.Image:
        """RGB. Raises DiffalignError for bytes that are no whole picture."""
        try:
            return Image.open(io.BytesIO(self.data)).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DiffalignError(f"image {self.index} of group {self.group_id} cannot be decoded: {error}") from error


@dataclass(frozen=True)
class _Place:
    shard: int
    row_group: int
    row: int


class PreferenceDataset:
    """A dataset folder. Opening it reads group ids and places of images, never the images."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not (self.folder / GROUPS_FILE).is_file():
            what = "is no dataset: it has no groups.parquet" if self.folder.is_dir() else "does not exist"
            raise DiffalignError(
                f"data.path {self.folder} {what}; make one with `diffalign sample`, or import your own pairs"
            )
        self.shards = sorted((self.folder / "images").glob("*.parquet"))

    # --- groups --------------------------------------------------------------------------------------------------------

    @cached_property
    def _table(self) -> Any:
        return pq.read_table(self.folder / GROUPS_FILE, memory_map=True)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def group(self, i: int) -> dict[str, Any]:
        """Row i of groups.parquet, its metadata as a dict."""
        row = {name: self._table[name][i].as_py() for name in self._table.column_names}
        return {**row, "metadata": json.loads(row["metadata"] or "{}")}

    def column(self, name: str) -> list[Any]:
        """One column of groups.parquet as a list."""
        return list(self._table[name].to_pylist())

    def split(self, name: str) -> list[int]:
        """Indices of a split's groups. Raises DiffalignError if there is no such split."""
        splits = self.column("split")
        found = [i for i, s in enumerate(splits) if s == name]
        if not found:
            raise DiffalignError(f"data.split={name!r} has no group in {self.folder}; there are {sorted(set(splits))}")
        return found

    # --- images --------------------------------------------------------------------------------------------------------

    @cached_property
    def _places(self) -> dict[str, dict[int, _Place]]:
        places: dict[str, dict[int, _Place]] = {}
        for shard, path in enumerate(self.shards):
            file = pq.ParquetFile(path)
            for row_group in range(file.num_row_groups):
                keys = file.read_row_group(row_group, columns=["group_id", "index"])
                pairs = zip(keys["group_id"].to_pylist(), keys["index"].to_pylist(), strict=True)
                for row, (group, index) in enumerate(pairs):
                    places.setdefault(group, {})[index] = _Place(shard, row_group, row)
        return places

    def members(self, group_id: str) -> list[int]:
        """Indices of a group's images, in order."""
        return sorted(self._places.get(group_id, {}))

    def images(self, group_id: str) -> list[ImageRow]:
        """A group's images, in order of their index."""
        rows = []
        for index in self.members(group_id):
            place = self._places[group_id][index]
            table = pq.ParquetFile(self.shards[place.shard], memory_map=True).read_row_group(place.row_group)
            rows.append(_image_row(table, place.row))
        return rows

    def iter_images(self, batch: int = 64) -> Iterator[list[ImageRow]]:
        """All images, streamed in the order of the shards."""
        for path in self.shards:
            for table in pq.ParquetFile(path).iter_batches(batch_size=batch):
                yield [_image_row(table, i) for i in range(table.num_rows)]

    def generators(self) -> dict[tuple[str, int], str]:
        """(group id, index) -> who made the image; read without the pictures."""
        found: dict[tuple[str, int], str] = {}
        for path in self.shards:
            table = pq.read_table(path, columns=["group_id", "index", "generator"])
            keys = zip(table["group_id"].to_pylist(), table["index"].to_pylist(), strict=True)
            found |= dict(zip(keys, table["generator"].to_pylist(), strict=True))
        return found

    def provenance(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(group id, provenance) of every image, without reading the images."""
        for path in self.shards:
            table = pq.read_table(path, columns=["group_id", "provenance"])
            for group, text in zip(table["group_id"].to_pylist(), table["provenance"].to_pylist(), strict=True):
                yield group, json.loads(text or "{}")

    # --- scores --------------------------------------------------------------------------------------------------------

    def rewards(self) -> list[str]:
        """Names of the rewards that scored this dataset."""
        return sorted(p.stem for p in (self.folder / "scores").glob("*.parquet"))

    def scores(self, reward: str, column: str | None = None) -> dict[tuple[str, int], float]:
        """(group id, index) -> score, by default the reward's first column; NaN where it could not score."""
        path = self.folder / "scores" / f"{reward}.parquet"
        if not path.is_file():
            have = ", ".join(self.rewards()) or "none"
            raise DiffalignError(f"labels.source: {self.folder} has no scores of {reward!r}; scored by: {have}")
        names = [n for n in pq.read_schema(path).names if n not in ("group_id", "index", "reason")]
        if column is not None and column not in names:
            raise DiffalignError(f"labels.source: {path} has no column {column!r}; it has {', '.join(names)}")
        name = column or names[0]
        table = pq.read_table(path, columns=["group_id", "index", name])
        keys = zip(table["group_id"].to_pylist(), table["index"].to_pylist(), strict=True)
        return {key: float("nan") if v is None else v for key, v in zip(keys, table[name].to_pylist(), strict=True)}

    # --- facts ---------------------------------------------------------------------------------------------------------

    def facts(self, split: str | None = None) -> dict[str, Any]:
        """What a dry run prints: sizes, and how many groups state no preference."""
        chosen = range(len(self)) if split is None else self.split(split)
        ids, preferences = self.column("group_id"), self.column("preference")
        sizes = [len(self.members(ids[i])) for i in chosen]
        spreads = [float(np.std(preferences[i])) if preferences[i] else 0.0 for i in chosen]
        prompts = self.column("prompt_id")
        return {
            "folder": str(self.folder),
            "groups": len(sizes),
            "images": sum(sizes),
            "images_per_group": f"{min(sizes)} to {max(sizes)}"
            if len(set(sizes)) > 1
            else str(sizes[0])
            if sizes
            else "0",
            "prompts": len({prompts[i] for i in chosen}),
            "scored_by": ", ".join(self.rewards()) or "nothing",
            "label_spread": round(float(np.mean(spreads)), 4) if spreads else 0.0,
            "without_preference": sum(s == 0.0 for s in spreads),
        }


def _image_row(table: Any, row: int) -> ImageRow:
    values = {name: table[name][row].as_py() for name in ("group_id", "index", "image", "generator", "seed")}
    return ImageRow(values["group_id"], values["index"], values["image"]["bytes"], values["generator"], values["seed"])
