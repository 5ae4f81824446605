"""Find where each image of a dataset is stored, by sorted arrays: 24 bytes an image, a second for a million."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffalign.data.own_parquet import IMAGES_MEND, open_parquet, read_columns, read_row_group
from diffalign.errors import DiffalignError

INDEX_BITS = 20  # a group has fewer than a million images
OPEN_FILES = 32


class ImageIndex:
    """Images sorted by (row of their group in groups.parquet, index). An image without a group is left out.

    Raises DiffalignError if an image occurs twice or a file is incomplete.
    """

    def __init__(self, shards: list[Path], group_ids: pa.ChunkedArray) -> None:
        self.shards = shards
        groups, indices, rows_of = [], [], []
        for path in shards:
            file = open_parquet(path, IMAGES_MEND)
            keys = read_columns(path, ["group_id", "index"], IMAGES_MEND)
            groups += keys["group_id"].chunks
            indices.append(keys["index"].to_numpy())
            rows_of.append([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
        # One sortable number for each image: its group's row and its index.
        named = pa.chunked_array(groups, type=pa.string())
        group = row_numbers(pc.index_in(named, value_set=group_ids.combine_chunks()))
        index = np.concatenate(indices).astype(np.int64) if indices else np.zeros(0, np.int64)
        known = np.flatnonzero(group >= 0)
        keys = (group[known] << INDEX_BITS) | index[known]
        order = np.argsort(keys, kind="stable")
        self.keys = keys[order]
        """Sorted: group row and index in one number."""
        self.positions = known[order]
        """Position of each among all rows of all shards."""
        self.starts = np.searchsorted(self.keys, np.arange(len(group_ids) + 1, dtype=np.int64) << INDEX_BITS)
        """The images of group i are starts[i]:starts[i + 1]."""
        # Which row group of which file holds each row, counted through all files.
        sizes = [(shard, i, n) for shard, counts in enumerate(rows_of) for i, n in enumerate(counts)]
        self._row_groups = [(shard, i) for shard, i, _ in sizes]
        self._first_row = np.concatenate([[0], np.cumsum([n for *_, n in sizes], dtype=np.int64)])
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._last: tuple[tuple[int, list[str]] | None, pa.Table | None] = (None, None)
        twice = np.flatnonzero(np.diff(self.keys) == 0)
        if len(twice):
            key = int(self.keys[twice[0]])
            raise DiffalignError(
                f"{shards[0].parent}: image {key & ((1 << INDEX_BITS) - 1)} of group "
                f"{group_ids[key >> INDEX_BITS].as_py()} is there twice"
            )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.keys)

    def indices(self, group: int) -> np.ndarray:
        """Return the indices of a group's images, ascending."""
        return self.keys[self.starts[group] : self.starts[group + 1]] & ((1 << INDEX_BITS) - 1)

    def find(self, group: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return the positions in `keys` of images given by group row and index, each [n]; -1 where there is none."""
        wanted = (group.astype(np.int64) << INDEX_BITS) | index.astype(np.int64)
        at = np.minimum(np.searchsorted(self.keys, wanted), max(len(self.keys) - 1, 0))
        return np.where((group >= 0) & (self.keys[at] == wanted), at, -1) if len(self.keys) else np.full(len(at), -1)

    def read(self, place: int, columns: list[str]) -> tuple[pa.Table, int]:
        """Return the row group that holds an image, and the image's row in it.

        The row group that was read last is kept, since a group's images mostly lie in one. The `OPEN_FILES` files used
        last stay open.
        """
        at, row = self._row(place)
        shard, row_group = self._row_groups[at]
        if self._last[0] != (at, columns):
            self._last = (None, None)  # freed before the next one is read
            path, file = self.shards[shard], self._file(shard)
            self._last = ((at, columns), read_row_group(path, file, row_group, columns, IMAGES_MEND))
        return self._last[1], row

    def path(self, place: int) -> Path:
        """Return the file that holds an image."""
        return self.shards[self._row_groups[self._row(place)[0]][0]]

    def names(self, place: int) -> list[str]:
        """Return the columns of the file that holds an image."""
        shard, _ = self._row_groups[self._row(place)[0]]
        return list(self._file(shard).schema_arrow.names)

    def _row(self, place: int) -> tuple[int, int]:
        """Return the number of the row group that holds an image, counted through all files, and the row in it."""
        position = int(self.positions[place])
        at = int(np.searchsorted(self._first_row, position, side="right")) - 1
        return at, position - int(self._first_row[at])

    def _file(self, shard: int) -> pq.ParquetFile:
        if shard not in self._open:
            self._open[shard] = open_parquet(self.shards[shard], IMAGES_MEND)
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]


def row_numbers(indices: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return the result of arrow's `index_in` as int64, with -1 for what was not found."""
    return np.asarray(indices.fill_null(-1).to_numpy(), dtype=np.int64)
