"""Compute perceptual hashes of a dataset's images once, and keep them in hashes.parquet."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.image_index import row_numbers
from diffalign.data.own_parquet import read_columns
from diffalign.data.writer import parquet_writer
from diffalign.errors import DiffalignError

_SCHEMA = pa.schema([("group_id", pa.string()), ("index", pa.int32()), ("hash", pa.uint64())])


def difference_hash(image: Image.Image) -> int:
    """Return 64 bits: whether each of 8 x 8 points is brighter than its right neighbour.

    It survives scaling and recompression.
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = (grey[:, :-1] > grey[:, 1:]).ravel()
    return int(np.packbits(bits).view(">u8")[0])


def image_hashes(dataset: PreferenceDataset) -> np.ndarray:
    """Return uint64 [images], in the order of `dataset.image_index`; an image that cannot be decoded matches no other."""
    path = dataset.folder / "hashes.parquet"
    if not path.is_file():
        with parquet_writer(path, _SCHEMA) as writer:
            for rows in dataset.iter_images():
                table = []
                for row in rows:
                    try:
                        value = difference_hash(row.decode())
                    except DiffalignError:
                        value = hash_of_nothing(row.group_id, row.index)
                    table.append({"group_id": row.group_id, "index": row.index, "hash": value})
                writer.write_table(pa.Table.from_pylist(table, schema=_SCHEMA))
    table = read_columns(path, _SCHEMA.names, "delete it, and the same command makes it again")
    ids = pa.array(dataset.column("group_id"))
    at = dataset.image_index.find(row_numbers(pc.index_in(table["group_id"], value_set=ids)), table["index"].to_numpy())
    found = np.zeros(len(dataset.image_index), dtype=np.uint64)
    found[at[at >= 0]] = table["hash"].to_numpy()[at >= 0]
    return found


def hash_of_nothing(group_id: str, index: int) -> int:
    """Return a hash that no other image has, except by chance."""

    return int.from_bytes(hashlib.blake2b(f"{group_id}\0{index}".encode(), digest_size=8).digest(), "big")
