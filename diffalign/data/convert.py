"""Find the reader for other people's data, and import your own pairs."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.data.imported import ImportedGroup, Report, SkippedRow, write_imported
from diffalign.data.read_groups import metadata_files, read_hpdv2, read_imagefolder
from diffalign.data.read_pairs import (
    is_hpdv3pp,
    read_hpdv3,
    read_hpdv3pp,
    read_pickapic,
    read_two_folders,
    read_w_l,
)
from diffalign.data.read_tables import is_table_of_pairs, read_table
from diffalign.data.tables import column_for, json_rows, table_kind
from diffalign.errors import DiffalignError
from diffalign.files.paths import inside, own_files

READERS: dict[str, Callable[[Path], Iterator[ImportedGroup | SkippedRow]]] = {
    "pickapic": read_pickapic,
    "hpdv2": read_hpdv2,
    "hpdv3": read_hpdv3,
    "hpdv3pp": read_hpdv3pp,
    "imagefolder": read_imagefolder,
    "w_l": read_w_l,
    "csv": read_table,
    "table": read_table,
}


def open_rows(sources: list[Path], form: str | None) -> tuple[str, Iterator[ImportedGroup | SkippedRow]]:
    """Return the format (guessed if `form` is None) and the rows of one source, or of two folders (winners, losers)."""
    if len(sources) == 2 and form in (None, "two_folders"):
        return "two_folders", read_two_folders(*sources)
    if len(sources) != 1:
        raise DiffalignError(f"data convert: {len(sources)} sources; give one, or two folders (winners, then losers)")
    if not sources[0].exists():
        raise DiffalignError(f"{sources[0]}: no such file or folder")
    name = form or guess_form(sources[0])
    if name not in READERS:
        raise DiffalignError(f"--format {name}: unknown; there are {', '.join([*READERS, 'two_folders'])}")
    return name, READERS[name](sources[0])


def import_pairs(sources: list[Path], out: Path, splits: dict[str, float] | None = None) -> Report:
    """Write your own pairs as a dataset: from a table, or from a folder of winners and a folder of losers.

    splits: as `write_imported` takes them. Raises DiffalignError at the first row or file that is broken.
    """
    if len(sources) > 2:
        raise DiffalignError(f"pairs: {len(sources)} sources; give one csv, or two folders (winners, then losers)")
    if len(sources) == 1 and sources[0].is_dir():
        raise DiffalignError(f"pairs: {sources[0]} is one folder; give two (winners, then losers) or a csv")
    rows = read_two_folders(*sources) if len(sources) == 2 else read_table(sources[0])
    return write_imported(rows, out, strict=True, splits=splits)


def guess_form(path: Path) -> str:
    """Return the format that a file or folder seems to have. Raises DiffalignError if it is none of those known."""
    if is_hpdv3pp(path):
        return "hpdv3pp"
    if path.is_dir():
        if (path / "w").is_dir() and (path / "l").is_dir():
            return "w_l"
        if any(file.is_file() for file in metadata_files(path)):
            return "imagefolder"
        named = [inside(path, f"{split}.json") for split in ("train", "test") if (path / f"{split}.json").is_file()]
        for file in named or own_files(path, "*.json", "*.jsonl"):
            return _json_form(file)
        parquet = next(iter(own_files(path, "**/*.parquet")), None)
        if parquet is not None:
            return _parquet_form(parquet)
        if next(path.rglob("*.tar"), None) is not None:
            return "table"
    elif table_kind(path) in (".csv", ".tsv"):
        return "csv"
    elif path.suffix == ".tar":
        return "table"
    elif path.suffix == ".parquet":
        return _parquet_form(path)
    elif path.suffix in (".json", ".jsonl"):
        return "imagefolder" if path.stem == "metadata" else _json_form(path)
    raise DiffalignError(f"{path}: not in a known format; name it with --format: {', '.join(READERS)}")


def _json_form(path: Path) -> str:
    for _, row in json_rows(path):
        if isinstance(row, dict):
            if "path1" in row:
                return "hpdv3"
            if "human_preference" in row or isinstance(row.get("rank"), list):
                return "hpdv2"
            if is_table_of_pairs(row):
                return "table"
            if column_for("image", row) and column_for("prompt", row):
                return "imagefolder"
            raise DiffalignError(f"{path}: rows with {', '.join(list(row)[:8])} fit no known format")
    raise DiffalignError(f"{path}: holds no row")


def _parquet_form(path: Path) -> str:
    try:
        names = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise DiffalignError(f"{path}: not a complete parquet file ({error})") from error
    if "jpg_0" in names:
        return "pickapic"
    if path.stem == "metadata":
        return "imagefolder"
    if is_table_of_pairs(names):
        return "table"
    raise DiffalignError(f"{path}: columns {', '.join(names[:8])} fit no known format; pickapic has jpg_0")
