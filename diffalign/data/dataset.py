"""Read a dataset folder without loading it: columns when asked for, images one by one or streamed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from diffalign.data.absent_labels import has_absent_labels, without_absent_labels
from diffalign.data.image_index import ImageIndex, row_numbers
from diffalign.data.own_parquet import GROUPS_MEND, IMAGES_MEND, SCORES_MEND, open_parquet, read_batches, read_columns
from diffalign.data.schema import CONDITIONS, GROUPS, GROUPS_FILE, HUMAN, GroupRow
from diffalign.data.voted import voted_shares
from diffalign.errors import DiffalignError
from diffalign.files import read_json, reading
from diffalign.files.images import Unreadable, decode
from diffalign.files.parse import parse_json
from diffalign.files.paths import is_plain_name
from diffalign.voting.log import VOTES_FILE, Vote, read_votes, votes_of

RANKING_FILE = "ranking.json"
NEEDED = ("group_id", "prompt_id", "prompt", "preference", "split")
IMAGE_COLUMNS = ["group_id", "index", "image", "generator", "seed"]


@dataclass(frozen=True)
class ImageRow:
    """One image as stored; `data` are its encoded bytes."""

    group_id: str
    index: int
    data: bytes
    generator: str
    seed: int

    def decode(self) -> Image.Image:
        """Return the image in RGB. Raises DiffalignError if the bytes are not a complete image."""
        try:
            return decode(self.data)
        except Unreadable as error:
            raise DiffalignError(f"image {self.index} of group {self.group_id} cannot be decoded: {error}") from error


class PreferenceDataset:
    """A dataset folder. Opening it reads group ids and the positions of images, never the images."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not (self.folder / GROUPS_FILE).is_file():
            what = "is not a dataset: it has no groups.parquet" if self.folder.is_dir() else "does not exist"
            raise DiffalignError(
                f"data.path {self.folder} {what}; make one from your pairs with `diffalign pairs`, or with `diffalign synth`"
            )
        self.shards = sorted((self.folder / "images").glob("*.parquet"))

    # --- groups --------------------------------------------------------------------------------------------------------

    @cached_property
    def _stored(self) -> pa.Table:
        path = self.folder / GROUPS_FILE
        table = read_columns(path, None, GROUPS_MEND)
        with reading(path, mend=GROUPS_MEND):
            for name in NEEDED:
                table[name]
        return table

    @cached_property
    def _table(self) -> pa.Table:
        return (
            without_absent_labels(self._stored, self.image_index) if has_absent_labels(self._stored) else self._stored
        )

    def __len__(self) -> int:
        """Return the number of groups."""
        return int(self._table.num_rows)

    def group(self, i: int) -> GroupRow:
        """Return row i of groups.parquet, its metadata as a dict."""
        stored = {name: self._table[name][i].as_py() for name in self._table.column_names}
        return {
            "group_id": stored["group_id"],
            "prompt_id": stored["prompt_id"],
            "prompt": stored["prompt"],
            "preference": stored.get("preference"),
            "split": stored["split"],
            "metadata": self._json(
                stored.get("metadata"), self.folder / GROUPS_FILE, f"metadata of group {stored['group_id']!r}"
            ),
            "members": stored.get("members"),  # older files lack this and the next
            "dropped": stored.get("dropped"),
            "human": self._stored_human[i],
        }

    def row(self, group_id: str) -> int | None:
        """Return the row number of a group in groups.parquet; None if it is not there."""
        return self._row_of.get(group_id)

    def column(self, name: str) -> list[Any]:
        """Return one column of groups.parquet as a list; None for every row if an older file lacks it."""
        if name not in self._table.column_names and name in GROUPS.names:
            return [None] * len(self)
        return list(self._table[name].to_pylist())

    @cached_property
    def human(self) -> list[list[float] | None]:
        """For each group the preference that people gave, a value for every image; None where they gave none.

        Votes on a group count in place of the preference that it was imported with.
        """
        voted = voted_shares(self.votes, self.all_members)
        return [voted.get(id_, stored) for id_, stored in zip(self.column("group_id"), self._stored_human, strict=True)]

    @cached_property
    def _stored_human(self) -> list[list[float] | None]:
        """The preferences of people in groups.parquet.

        Older files lack the column: their preferences are people's unless they were drawn or ranked by this package.
        """
        if HUMAN in self._table.column_names:
            return self.column(HUMAN)
        made_here = (self.folder / "sampling.json").is_file() or self.ranking() is not None
        stored = (
            self._stored["preference"].to_pylist() if "preference" in self._stored.column_names else [None] * len(self)
        )
        return [None if made_here else preference or None for preference in stored]

    @cached_property
    def votes(self) -> list[Vote]:
        """The votes of `diffalign vote` that count, of all raters."""
        return read_votes(self.folder / VOTES_FILE)

    def raters(self) -> list[str]:
        """Return the names of those who voted; each is a source, as a reward is."""
        return sorted({vote.rater for vote in self.votes if vote.ranks})

    def votes_for(self, source: str) -> list[Vote]:
        """Return the votes behind a source: all for `human`, a rater's for their name, none for a reward."""
        return votes_of(self.votes, source)

    def ranking(self) -> dict[str, Any] | None:
        """Return the settings and the report of the last ranking; None if there was none."""
        path = self.folder / RANKING_FILE
        mend = "delete it, and `diffalign rank` writes it again"
        found: dict[str, Any] | None = read_json(path, mend, "settings", "report")
        if found is not None:
            with reading(path, mend=mend):
                found["settings"]["sources"], found["report"]["dropped"]
        return found

    def split(self, name: str) -> list[int]:
        """Return the row numbers of a split's groups, without those that ranking dropped.

        Raises DiffalignError if there is no such split.
        """
        splits, dropped = self.column("split"), self.column("dropped")
        found = [i for i, s in enumerate(splits) if s == name and not dropped[i]]
        if not found:
            raise DiffalignError(f"data.split={name!r} has no group in {self.folder}; there are {sorted(set(splits))}")
        return found

    # --- images --------------------------------------------------------------------------------------------------------

    @cached_property
    def image_index(self) -> ImageIndex:
        """Where each image is stored."""
        return ImageIndex(self.shards, self._stored["group_id"])

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {group: row for row, group in enumerate(self.column("group_id"))}

    @cached_property
    def _chosen(self) -> dict[int, list[int]]:
        """Row number -> indices of the images that count, for groups where not all do."""
        return {i: chosen for i, chosen in enumerate(self.column("members")) if chosen is not None}

    def all_members(self, group_id: str) -> list[int]:
        """Return the indices of a group's images, ascending, whether they count or not."""
        row = self._row_of.get(group_id)
        return [] if row is None else [int(i) for i in self.image_index.indices(row)]

    def members(self, group_id: str) -> list[int]:
        """Return the indices of a group's images that count, ascending; `diffalign rank` may have chosen some of them."""
        chosen = self._chosen.get(self._row_of.get(group_id, -1))
        members = self.all_members(group_id)
        return members if chosen is None else [i for i in members if i in chosen]

    def images(self, group_id: str) -> list[ImageRow]:
        """Return a group's images that count, ordered by their index."""
        row = self._row_of.get(group_id, -1)
        wanted = self.members(group_id)
        found = self.image_index.find(np.full(len(wanted), row), np.array(wanted, dtype=np.int64))
        return [self.image_at(int(place)) for place in found]

    def image_at(self, place: int) -> ImageRow:
        """Return one image, by its position in `image_index`."""
        return _image_row(*self.image_index.read(place, IMAGE_COLUMNS))

    @cached_property
    def condition_index(self) -> ImageIndex:
        """Where the condition images are stored; empty where the images were made from the prompt alone."""
        return ImageIndex(sorted((self.folder / CONDITIONS).glob("*.parquet")), self._stored["group_id"])

    def condition_places(self, group_ids: Sequence[str]) -> np.ndarray:
        """Return the positions of the groups' condition images in `condition_index`, [n]; -1 where there is none."""
        rows = np.array([self._row_of.get(group_id, -1) for group_id in group_ids], dtype=np.int64)
        return self.condition_index.find(rows, np.zeros(len(rows), np.int64))

    def condition(self, group_id: str) -> ImageRow | None:
        """Return the image that a group's images are edits of; None if there is none."""
        place = int(self.condition_places([group_id])[0])
        return None if place < 0 else _image_row(*self.condition_index.read(place, IMAGE_COLUMNS))

    def iter_images(self, batch: int = 64) -> Iterator[list[ImageRow]]:
        """Yield all images in lists of `batch`, in the order of the shards."""
        for shard in range(len(self.shards)):
            yield from self.iter_shard(shard, batch)

    def iter_shard(self, shard: int, batch: int = 64) -> Iterator[list[ImageRow]]:
        """Yield the images of one file in lists of `batch`."""
        for table in read_batches(self.shards[shard], batch, IMAGE_COLUMNS, IMAGES_MEND):
            yield [_image_row(table, i) for i in range(table.num_rows)]

    def generators(self) -> dict[tuple[str, int], str]:
        """Return (group id, index) -> the generator of the image, without reading the images."""
        found: dict[tuple[str, int], str] = {}
        for path in self.shards:
            table = read_columns(path, ["group_id", "index", "generator"], IMAGES_MEND)
            keys = zip(table["group_id"].to_pylist(), table["index"].to_pylist(), strict=True)
            found |= dict(zip(keys, table["generator"].to_pylist(), strict=True))
        return found

    def provenance(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (group id, provenance) of every image, without reading the images."""
        for path in self.shards:
            table = read_columns(path, ["group_id", "provenance"], IMAGES_MEND)
            for group, text in zip(table["group_id"].to_pylist(), table["provenance"].to_pylist(), strict=True):
                yield group, self._json(text, path, f"provenance of an image of group {group!r}")

    # --- scores --------------------------------------------------------------------------------------------------------

    def rewards(self) -> list[str]:
        """Return the names of the rewards that scored this dataset."""
        return sorted(p.stem for p in (self.folder / "scores").glob("*.parquet"))

    def scores(self, reward: str, column: str | None = None) -> dict[tuple[str, int], float]:
        """Return (group id, index) -> score, by default the reward's first column; NaN where it could not score."""
        if (given := self._given_by(reward)) is not None:
            ids, index, values = self.column("group_id"), self.image_index, self._array_of(given).tolist()
            images = [(ids[row], int(k)) for row in range(len(self)) for k in index.indices(row)]
            return dict(zip(images, values, strict=True))
        table, name = self._score_table(reward, column)
        keys = zip(table["group_id"].to_pylist(), table["index"].to_pylist(), strict=True)
        return {key: float("nan") if v is None else v for key, v in zip(keys, table[name].to_pylist(), strict=True)}

    def score_array(self, source: str) -> np.ndarray:
        """Return the scores of "reward" or "reward.column" as [images], in the order of `image_index`; NaN where
        missing. "human": the preferences that people gave; the name of a rater: that person's votes.
        """
        if (given := self._given_by(source)) is not None:
            return self._array_of(given)
        reward, _, column = source.partition(".")
        table, name = self._score_table(reward, column or None)
        group = pc.index_in(table["group_id"], value_set=self._table["group_id"].combine_chunks())
        at = self.image_index.find(row_numbers(group), table["index"].to_numpy())
        values = np.full(len(self.image_index), np.nan)
        scored = np.asarray(table[name].cast("float64").fill_null(float("nan")).to_numpy())
        values[at[at >= 0]] = scored[at >= 0]
        return values

    def _given_by(self, source: str) -> list[list[float] | None] | None:
        """Return what people gave each group, of all or of one rater; None for a reward."""
        if source == HUMAN:
            return self.human if any(self.human) else None
        if source not in self.raters():
            return None
        voted = voted_shares(self.votes_for(source), self.all_members)
        return [voted.get(id_) for id_ in self.column("group_id")]

    def _array_of(self, groups: list[list[float] | None]) -> np.ndarray:
        """Return values of groups in the order of `image_index`."""
        values = np.full(len(self.image_index), np.nan)
        for i, given in enumerate(groups):
            start, end = self.image_index.starts[i : i + 2]
            if given and len(given) != end - start:
                group = self.column("group_id")[i]
                raise DiffalignError(
                    f"group {group} of {self.folder} has {end - start} images and {len(given)} preferences of people; "
                    "convert the data again"
                )
            if given:
                values[start:end] = given
        return np.where(np.isfinite(values), values, np.nan)

    def image_column(self, name: str) -> np.ndarray:
        """Return a column of the image files other than `image`, such as `generator`, in the order of `image_index`."""
        parts = [read_columns(path, [name], IMAGES_MEND)[name].to_pylist() for path in self.shards]
        values = np.array([value for part in parts for value in part], dtype=object)
        if len(values) <= int(self.image_index.positions.max(initial=-1)):
            raise DiffalignError(
                f"{self.folder}/images cannot be read (column {name} is shorter than the others); {IMAGES_MEND}"
            )
        return values[self.image_index.positions]

    def score_columns(self, reward: str) -> list[str]:
        """Return the names of a reward's columns, the score first."""
        return [n for n in self._score_schema(reward).names if n not in ("group_id", "index", "reason")]

    def scored_by(self, reward: str) -> dict[str, Any]:
        """Return what is stored about the reward that made these scores: version, weights, licence, settings."""
        known = (self._score_schema(reward).metadata or {}).get(b"diffalign")
        return self._json(known, self._score_file(reward), f"note of the reward {reward}")

    def _score_schema(self, reward: str) -> pa.Schema:
        return open_parquet(self._score_file(reward), SCORES_MEND).schema_arrow

    def _score_file(self, reward: str) -> Path:
        path = self.folder / "scores" / f"{reward}.parquet"
        if not is_plain_name(reward) or not path.is_file():
            have = ", ".join([*self.rewards(), *self.raters()]) or "none"
            raise DiffalignError(f"labels.source: {self.folder} has no scores of {reward!r}; scored by: {have}")
        return path

    def _score_table(self, reward: str, column: str | None) -> tuple[pa.Table, str]:
        path, names = self._score_file(reward), self.score_columns(reward)
        if column is not None and column not in names:
            raise DiffalignError(f"labels.source: {path} has no column {column!r}; it has {', '.join(names)}")
        with reading(path, mend=SCORES_MEND):
            name = column or names[0]
            table = read_columns(path, ["group_id", "index", name], SCORES_MEND)
            table = table.set_column(2, name, table[name].cast("float64"))
        return table, name

    def _json(self, text: str | bytes | None, path: Path, what: str) -> dict[str, Any]:
        """Return the object of a cell of JSON. Raises DiffalignError, which names `what`, if it holds none."""
        try:
            found = parse_json(text or "{}")
        except ValueError as error:
            raise DiffalignError(f"{path}: {what} is not JSON ({error}); make the dataset again") from error
        if not isinstance(found, dict):
            raise DiffalignError(f"{path}: {what} is no object; make the dataset again")
        return found

    # --- facts ---------------------------------------------------------------------------------------------------------

    def facts(self, split: str | None = None) -> dict[str, Any]:
        """Return what a dry run prints: sizes, and how many groups state no preference."""
        chosen = range(len(self)) if split is None else self.split(split)
        dropped = sum(bool(reason) for reason in self.column("dropped"))
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
            **({"dropped_by_ranking": dropped} if dropped else {}),
        }


def _image_row(table: pa.Table | pa.RecordBatch, row: int) -> ImageRow:
    values = {name: table[name][row].as_py() for name in IMAGE_COLUMNS}
    return ImageRow(values["group_id"], values["index"], bytes_of(values["image"]), values["generator"], values["seed"])


def bytes_of(image: dict[str, bytes | None] | None) -> bytes:
    """Return the bytes of a cell of the column `image`; none for an empty cell, which then cannot be decoded."""
    return (image or {}).get("bytes") or b""
