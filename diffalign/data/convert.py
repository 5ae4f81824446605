"""Find the reader for other people's data, and import your own pairs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from diffalign.data.containers import ARCHIVES, TABLES, TARS, containers_below, kind_of, unpacked
from diffalign.data.folder_metadata import METADATA_FILES
from diffalign.data.imported import ImportedGroup, Report, SkippedRow, write_imported
from diffalign.data.read_groups import LABELS, read_hpdv2, read_imagefolder
from diffalign.data.read_pairs import (
    is_hpdv3pp,
    read_hpdv3,
    read_hpdv3pp,
    read_pickapic,
    read_two_folders,
    read_w_l,
)
from diffalign.data.read_tables import csv_files, is_table_of_pairs, read_table
from diffalign.data.tables import column_for, json_files, json_rows, table_kind, table_schema
from diffalign.data.webdataset import is_export
from diffalign.errors import DiffalignError
from diffalign.files.paths import inside
from diffalign.hub import dataset_command

Rows = Iterator[ImportedGroup | SkippedRow]
READERS: dict[str, Callable[[Path], Rows]] = {
    "pickapic": read_pickapic,
    "hpdv2": read_hpdv2,
    "hpdv3": read_hpdv3,
    "hpdv3pp": read_hpdv3pp,
    "imagefolder": read_imagefolder,
    "w_l": read_w_l,
    "csv": read_table,
    "table": read_table,
}


def open_rows(sources: list[Path], form: str | None) -> tuple[str, Rows]:
    """Return the format (guessed if `form` is None) and the rows of one source, or of two folders (winners, losers).

    A zip or tar file is read as the folder that it holds.
    """
    if len(sources) == 2 and form in (None, "two_folders"):
        return "two_folders", read_two_folders(*sources)
    if len(sources) != 1:
        raise DiffalignError(f"data convert: {len(sources)} sources; give one, or two folders (winners, then losers)")
    if not sources[0].exists():
        raise DiffalignError(f"{sources[0]}: no such file or folder{_of_the_hub(sources[0])}")
    if form is not None and form not in READERS:
        raise DiffalignError(f"--format {form}: unknown; there are {', '.join([*READERS, 'two_folders'])}")
    if _holds_folder(sources[0]):
        return _rows_in_archive(sources[0], form)
    name = form or guess_form(sources[0])
    return name, READERS[name](sources[0])


def _of_the_hub(source: Path) -> str:
    """Return how to fetch a source whose name is that of a dataset on the hub, `owner/name`; else ""."""
    name = source.as_posix()
    if source.is_absolute() or name.startswith(".") or name.count("/") != 1:
        return ""
    command = dataset_command(name, source.name)
    return f"; if it is a dataset of the hub, fetch it with `{command}`, and give the folder {source.name}"


def _holds_folder(path: Path) -> bool:
    """Return whether a path is an archive of files, not a tar of our webdataset export, which is read as it is."""
    return kind_of(path) in ARCHIVES and path.is_file() and not (kind_of(path) in TARS and is_export(path))


def _rows_in_archive(path: Path, form: str | None) -> tuple[str, Rows]:
    """Return format and rows of an archive's files. They lie in a temporary folder until the last row was read."""
    with ExitStack() as stack:
        folder = stack.enter_context(unpacked(path))
        with _named(folder, path):
            name = form or guess_form(folder)
        return name, _renamed(READERS[name](folder), folder, path, stack.pop_all())


def _renamed(rows: Rows, folder: Path, path: Path, stack: ExitStack) -> Rows:
    """Yield rows with the archive's name in place of the temporary folder's."""
    with stack, _named(folder, path):
        for row in rows:
            where = row.where.replace(str(folder), str(path))
            if isinstance(row, SkippedRow):
                yield SkippedRow(where, row.reason.replace(str(folder), str(path)), row.fault)
            else:
                yield replace(row, where=where)


@contextmanager
def _named(folder: Path, path: Path) -> Iterator[None]:
    try:
        yield
    except DiffalignError as error:
        raise DiffalignError(str(error).replace(str(folder), str(path))) from error


def import_pairs(sources: list[Path], out: Path, splits: dict[str, float] | None = None) -> Report:
    """Write your own pairs as a dataset: from a table, or from a folder of winners and a folder of losers.

    splits: as `write_imported` takes them. Raises DiffalignError at the first row or file that is broken.
    """
    if len(sources) > 2:
        raise DiffalignError(f"pairs: {len(sources)} sources; give one csv, or two folders (winners, then losers)")
    if len(sources) == 1 and sources[0].is_dir():
        raise DiffalignError(f"pairs: {sources[0]} is one folder; give two (winners, then losers) or a csv")
    if len(sources) == 2:
        rows: Rows = read_two_folders(*sources)
    elif _holds_folder(sources[0]):
        rows = _rows_in_archive(sources[0], None)[1]
    else:
        rows = read_table(sources[0])
    return write_imported(rows, out, strict=True, splits=splits)


def guess_form(path: Path) -> str:
    """Return the format that a file or folder seems to have. Raises DiffalignError if it is none of those known."""
    if is_hpdv3pp(path):
        return "hpdv3pp"
    if path.is_dir():
        if (path / "w").is_dir() and (path / "l").is_dir():
            return "w_l"
        if any((path / name).is_file() for name in METADATA_FILES):
            return "imagefolder"
        named = [inside(path, f"{split}.json") for split in ("train", "test") if (path / f"{split}.json").is_file()]
        for file in named or json_files(path):
            return _json_form(file)
        found = containers_below(path)
        if table := next((file for file in found if kind_of(file) in TABLES), None):
            return _form_of_columns(table)
        if any(kind_of(file) in TARS for file in found) or csv_files(path):
            return "table"
    elif table_kind(path) in (".csv", ".tsv"):
        return "csv"
    elif kind_of(path) in TARS:
        return "table"
    elif kind_of(path) in TABLES:
        return _form_of_columns(path)
    elif table_kind(path) in (".json", ".jsonl"):
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


def _form_of_columns(path: Path) -> str:
    """Return the format of a parquet or arrow file."""
    schema = table_schema(path)
    # A column of lists stands for a row with a list in it.
    lists = (pa.ListType, pa.LargeListType, pa.FixedSizeListType)
    row: dict[str, object] = {field.name: [] if isinstance(field.type, lists) else None for field in schema}
    if "jpg_0" in row:
        return "pickapic"
    if path.stem == "metadata":
        return "imagefolder"
    if is_table_of_pairs(row):
        return "table"
    if column_for("image", row) and column_for("prompt", row) and any(label in row for label in LABELS):
        return "imagefolder"
    raise DiffalignError(f"{path}: columns {', '.join(list(row)[:8])} fit no known format; pickapic has jpg_0")
