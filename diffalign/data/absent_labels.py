"""Leave images without a finite preference out of their group, in a groups.parquet that somebody else wrote."""

from math import isfinite

import pyarrow as pa
import pyarrow.compute as pc

from diffalign.data.image_index import ImageIndex

FEWER_THAN_TWO = "fewer than two images have a label"


def has_absent_labels(groups: pa.Table) -> bool:
    """Return whether some preference in the rows of groups.parquet is null, NaN or infinite."""
    if "preference" not in groups.column_names:
        return False
    values = pc.list_flatten(groups["preference"])
    return not pc.all(pc.fill_null(pc.is_finite(values), False), min_count=0).as_py()


def without_absent_labels(groups: pa.Table, index: ImageIndex) -> pa.Table:
    """Return the rows of groups.parquet so that each image that counts has a finite preference.

    An image without one is no longer among the group's `members`: an absent label is no tie and not the worst. A group in
    which fewer than two are left is `dropped`. Rows whose preferences do not fit their images stay as they are.
    """
    rows = groups.select([n for n in ("preference", "members", "dropped") if n in groups.column_names]).to_pylist()
    for number, row in enumerate(rows):
        values = row["preference"] or []
        known = [value is not None and isfinite(value) for value in values]
        counting = row.get("members") or [int(i) for i in index.indices(number)]
        if all(known) or len(counting) != len(values):
            continue
        row["preference"] = [value for value, one in zip(values, known, strict=True) if one]
        row["members"] = [member for member, one in zip(counting, known, strict=True) if one]
        if len(row["members"]) < 2:
            row["dropped"] = row.get("dropped") or FEWER_THAN_TWO
    for name, kind in (
        ("preference", pa.list_(pa.float32())),
        ("members", pa.list_(pa.int32())),
        ("dropped", pa.string()),
    ):
        column = pa.array([row.get(name) for row in rows], type=kind)
        at = groups.schema.get_field_index(name)
        groups = groups.append_column(name, column) if at < 0 else groups.set_column(at, name, column)
    return groups
