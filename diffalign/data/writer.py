"""Write a dataset folder. Files are written beside their name and renamed, so a kill leaves only complete ones."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffalign.data.schema import GROUPS, GROUPS_FILE, IMAGES, GroupRow
from diffalign.errors import DiffalignError
from diffalign.files import replacing
from diffalign.files.images import encoded
from diffalign.redaction import without_folders

ROWS_PER_GROUP = 64  # images in a parquet row group: the most that one random access reads


@contextmanager
def parquet_writer(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Yield a writer of a parquet file that appears under its name only when it is complete."""
    with replacing(path) as part, pq.ParquetWriter(part, schema, write_page_checksum=True) as writer:
        yield writer


def regrouped(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yield the same rows in tables of `rows` rows, the last one shorter."""
    pending: list[pa.Table] = []
    for table in tables:
        pending.append(table)
        while sum(t.num_rows for t in pending) >= rows:
            joined = pa.concat_tables(pending)
            yield joined.slice(0, rows)
            pending = [joined.slice(rows)]
    if pending and (joined := pa.concat_tables(pending)).num_rows:
        yield joined


def png_bytes(image: Image.Image) -> bytes:
    """Return the image as PNG without metadata: equal images have equal bytes."""
    return encoded(image.convert("RGB"), "PNG")


def image_row(
    group_id: str,
    index: int,
    image: Image.Image | bytes,
    generator: str,
    seed: int,
    provenance: dict[str, Any],
    latent: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return one row of `schema.IMAGES`; bytes are an encoded image and are kept as they are."""
    data = image if isinstance(image, bytes) else png_bytes(image)
    row = {
        "group_id": group_id,
        "index": index,
        "image": {"bytes": data, "path": None},
        "generator": generator,
        "seed": seed,
        "provenance": json.dumps(without_folders(provenance), sort_keys=True),
    }
    if latent is not None:
        row |= {"latent": latent.astype(np.float16).tobytes(), "latent_shape": list(latent.shape)}
    return row


class ImageWriter:
    """Writes images as a stream into one shard, `images/<shard>.parquet`; at most 64 are in memory.

    kind: `conditions` for condition images, in their own folder.
    """

    def __init__(self, folder: Path, shard: str = "part-00000", kind: str = "images") -> None:
        self.path = Path(folder) / kind / f"{shard}.parquet"
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> "ImageWriter":
        self._file = parquet_writer(self.path, IMAGES)
        self._writer = self._file.__enter__()
        return self

    def write(
        self,
        group_id: str,
        index: int,
        image: Image.Image | bytes,
        generator: str,
        seed: int,
        provenance: dict[str, Any],
    ) -> None:
        """Add one image; bytes are an encoded image and are kept as they are."""
        self.rows.append(image_row(group_id, index, image, generator, seed, provenance))
        if len(self.rows) == ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self.rows:
            self._writer.write_table(pa.Table.from_pylist(self.rows, schema=IMAGES))
            self.rows = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._file.__exit__(kind, error, trace)


def write_groups(folder: Path, rows: Iterable[GroupRow], batch: int = 4096) -> int:
    """Write `groups.parquet` from rows with the columns of `schema.GROUPS`; return how many.

    The preference of a row without `human` is taken to be given by people, so that ranking keeps it. Raises
    DiffalignError if a group id occurs twice.
    """
    seen: set[str] = set()
    pending: list[dict[str, Any]] = []
    with parquet_writer(Path(folder) / GROUPS_FILE, GROUPS) as writer:
        for row in rows:
            if row["group_id"] in seen:
                raise DiffalignError(f"group id {row['group_id']!r} occurs twice; group ids must be unique")
            seen.add(row["group_id"])
            human = row["human"] if "human" in row else (not row.get("members") and row["preference"]) or None
            pending.append(
                {**row, "human": human, "metadata": json.dumps(row["metadata"], sort_keys=True, default=str)}
            )
            if len(pending) == batch:
                writer.write_table(pa.Table.from_pylist(pending, schema=GROUPS))
                pending = []
        if pending or not seen:
            writer.write_table(pa.Table.from_pylist(pending, schema=GROUPS))
    return len(seen)
